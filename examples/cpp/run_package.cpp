// Runs a package of slope_fx.package in C++, without Python.
//
//     run_package FOLDER TOKEN...
//
// FOLDER has model.pt2 and libslope_fx.so. The tokens are one prompt. The program prints the most
// likely next token and writes the logits, float32 (length, vocabulary), to FOLDER/logits.bin.
#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::cerr << "usage: run_package FOLDER TOKEN...\n";
    return 2;
  }
  const std::string folder = argv[1];
  // The library registers the ops of the package. It is loaded first.
  if (!dlopen((folder + "/libslope_fx.so").c_str(), RTLD_NOW)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");

  std::vector<int64_t> tokens;
  for (int i = 2; i < argc; i++) tokens.push_back(std::stoll(argv[i]));
  const auto input_ids = torch::tensor(tokens, torch::kInt64).unsqueeze(0);

  c10::InferenceMode mode;
  const auto logits = model.run({input_ids})[0][0].to(torch::kFloat32).contiguous();
  std::cout << "next token: " << logits[-1].argmax().item<int64_t>() << "\n";
  std::ofstream(folder + "/logits.bin", std::ios::binary)
      .write(static_cast<const char*>(logits.const_data_ptr()), logits.nbytes());
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
