/* The ops of a frozen model, registered with PyTorch's dispatcher in C++.
 *
 * build.py links this file and engine.c into one library. It uses PyTorch's stable C interface, so
 * it loads into any PyTorch from 2.10 on, in Python and in C++, without slope_fx. ops/frozen.py has
 * the same schemas, and describes the arguments.
 *
 * The time of a small product is that of its call: a call from Python to an op in Python costs some
 * 17 us, to this one 4 us. */
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "frozen.h"

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Form = std::vector<int64_t>;

extern "C" {
int slope_stream(const void *x, long x_stride, long tokens, const frozen_t *products, int count, long d_in,
                 int n, int m, int bits, int group, int dtype, int threads);
int slope_panels(const void *x, long x_stride, long tokens, const void *values, const uint8_t *mask,
                 const void *bias, long d_out, long d_in, int n, int m, void *y, int dtype,
                 int threads);
int slope_expand_quantised(const void *codes, const void *scales, const uint8_t *mask, long d_out,
                           long d_in, int n, int m, int bits, int group, void *dense, int dtype,
                           int threads);
int slope_expand(const void *values, const uint8_t *mask, long d_out, long d_in, int n, int m,
                 void *dense, int dtype, int threads);
}

namespace {

/* The positions in `form`, as in ops/frozen.py. Pairs (fewest tokens, route) follow. */
enum { N, M, BITS, GROUP, DTYPE, D_IN, ROUTES };
enum Route { STREAM, PANELS, DENSE };

int code_of(ScalarType dtype) { /* of vectors.h */
    switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: STD_TORCH_CHECK(false, "a frozen linear of slope_fx takes float32, bfloat16, float16 and float64");
    }
}

void check(int code, const Form &form) {
    STD_TORCH_CHECK(code != 1, "the CPU engine of slope_fx could not allocate its working memory");
    STD_TORCH_CHECK(code != 4, "a frozen linear has codes of ", form[BITS], " bits in groups of ", form[GROUP]);
    STD_TORCH_CHECK(code == 0, "a forward mask of a frozen linear is not ", form[N], ":", form[M]);
}

const void *pointer(const std::optional<Tensor> &tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
}

Tensor empty(const int64_t *sizes, int64_t dims, ScalarType type) {
    int64_t strides[64], step = 1;
    for (int64_t i = dims - 1; i >= 0; i--) {
        strides[i] = step;
        step *= sizes[i];
    }
    int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                    : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                    : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                   : aoti_torch_dtype_float64();
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

/* out = beta * out + x w^T */
void product(const Tensor &out, const Tensor &x, const Tensor &w, double beta) {
    Tensor transposed = torch::stable::transpose(w, 0, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        beta ? aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), transposed.get(), beta, 1)
             : aoti_torch_cpu_mm_out(out.get(), x.get(), transposed.get()));
}

/* For float64 there are no kernels: it is for comparisons, not for speed. */
void expand_f64(const double *values, const uint8_t *mask, int64_t d_out, int64_t d_in, double *dense) {
    for (int64_t row = 0; row < d_out; row++, mask += (d_in + 7) / 8)
        for (int64_t c = 0; c < d_in; c++) *dense++ = mask[c / 8] >> c % 8 & 1 ? *values++ : 0;
}

/* The dense W^R in a dtype; of values that are no codes, in theirs. */
Tensor expand(const Tensor &values, const Tensor &mask, const std::optional<Tensor> &scales, const Form &form,
              ScalarType dtype) {
    int64_t sizes[2] = {values.size(0), form[D_IN]};
    bool wide = dtype == ScalarType::Double;
    Tensor dense = empty(sizes, 2, wide && scales ? ScalarType::Float : dtype);
    const auto *bits = (const uint8_t *)mask.const_data_ptr();
    int n = form[N], m = form[M], threads = torch::stable::get_num_threads();
    if (scales) {
        check(slope_expand_quantised(values.const_data_ptr(), scales->const_data_ptr(), bits, sizes[0], sizes[1], n,
                                     m, form[BITS], form[GROUP], dense.mutable_data_ptr(),
                                     wide ? 0 : code_of(dtype), threads),
              form);
        return wide ? torch::stable::to(dense, ScalarType::Double) : dense;
    }
    if (wide)
        expand_f64((const double *)values.const_data_ptr(), bits, sizes[0], sizes[1],
                   (double *)dense.mutable_data_ptr());
    else
        check(slope_expand(values.const_data_ptr(), bits, sizes[0], sizes[1], n, m, dense.mutable_data_ptr(),
                           code_of(dtype), threads),
              form);
    return dense;
}

int64_t route_of(const Form &form, int64_t tokens) {
    int64_t route = form[ROUTES + 1];
    for (size_t i = ROUTES; i + 1 < form.size() && form[i] <= tokens; i += 2) route = form[i + 1];
    return route;
}

/* A weight, and where its product goes: rows of y in one block of memory. */
struct Product {
    Tensor y, values, mask;
    std::optional<Tensor> scales, bias, lora_a, lora_b;
};

std::optional<Tensor> contiguous(const std::optional<Tensor> &tensor) {
    return tensor && !tensor->is_contiguous() ? torch::stable::contiguous(*tensor) : tensor;
}

/* The products of several weights with the same x, by the route STREAM. */
void stream(const Tensor &x, std::vector<Product> &products, const Form &form, int64_t tokens) {
    std::vector<frozen_t> operands;
    for (Product &p : products) {
        p.lora_a = contiguous(p.lora_a);
        p.lora_b = contiguous(p.lora_b);
        operands.push_back({p.values.const_data_ptr(), pointer(p.scales), (const uint8_t *)p.mask.const_data_ptr(),
                            pointer(p.bias), pointer(p.lora_a), pointer(p.lora_b),
                            p.lora_a ? (long)p.lora_a->size(0) : 0, (long)p.values.size(0),
                            p.y.mutable_data_ptr()});
    }
    check(slope_stream(x.const_data_ptr(), form[D_IN], tokens, operands.data(), operands.size(), form[D_IN], form[N],
                       form[M], form[BITS], form[GROUP], code_of(x.scalar_type()), torch::stable::get_num_threads()),
          form);
}

/* The product of a weight with x, which is in one block of memory, by another route. */
void linear(const Tensor &x, const Product &p, const Form &form, int64_t tokens, int64_t route) {
    int64_t d_out = p.values.size(0), d_in = form[D_IN];
    int64_t rows[2] = {tokens, d_in}, outputs[2] = {tokens, d_out};
    Tensor flat = torch::stable::view(x, {rows, 2}), flat_y = torch::stable::view(p.y, {outputs, 2});
    if (route == PANELS) {
        check(slope_panels(x.const_data_ptr(), d_in, tokens, p.values.const_data_ptr(),
                           (const uint8_t *)p.mask.const_data_ptr(), pointer(p.bias), d_out, d_in, form[N], form[M],
                           flat_y.mutable_data_ptr(), code_of(x.scalar_type()), torch::stable::get_num_threads()),
              form);
    } else {
        /* The adapter stays beside the product: in the weight, it would be rounded with it. */
        Tensor dense = expand(p.values, p.mask, p.scales, form, x.scalar_type());
        if (p.bias) {
            Tensor transposed = torch::stable::transpose(dense, 0, 1);
            STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(flat_y.get(), p.bias->get(), flat.get(),
                                                                   transposed.get(), 1, 1));
        } else {
            product(flat_y, flat, dense, 0);
        }
    }
    if (p.lora_a) {
        int64_t narrow[2] = {tokens, p.lora_a->size(0)};
        Tensor down = empty(narrow, 2, x.scalar_type());
        product(down, flat, *p.lora_a, 0);
        product(flat_y, down, *p.lora_b, 1);
    }
}

/* The products of weights with the same x. `forms` has the form of each. */
void linears(Tensor x, std::vector<Product> products, const std::vector<Form> &forms, int64_t tokens) {
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    std::vector<Product> streamed;
    for (size_t k = 0; k < products.size(); k++) {
        products[k].bias = contiguous(products[k].bias);
        const Product &p = products[k];
        int64_t route = x.scalar_type() == ScalarType::Double ? DENSE : route_of(forms[k], tokens);
        /* A part of the rows of a weight whose form has this route. */
        if (route == STREAM && !p.scales && p.values.size(0) < FEWEST_ROWS) route = DENSE;
        if (route == STREAM)
            streamed.push_back(products[k]);
        else
            linear(x, products[k], forms[k], tokens, route);
    }
    if (!streamed.empty()) stream(x, streamed, forms[0], tokens);
}

/* The output of a product; checks the operands. `values` are none if they are codes. */
Tensor output(const Tensor &x, int64_t d_out, const std::optional<Tensor> &values,
              const std::optional<Tensor> &bias, const std::optional<Tensor> &lora_a,
              const std::optional<Tensor> &lora_b, const Form &form) {
    int64_t dims = x.dim(), d_in = x.size(dims - 1), sizes[64];
    STD_TORCH_CHECK(dims <= 64 && form[D_IN] == d_in, "slope_fx::frozen_linear: x has ", d_in,
                    " features, the weight reads ", form[D_IN]);
    for (const auto &operand : {values, bias, lora_a, lora_b})
        STD_TORCH_CHECK(!operand || operand->scalar_type() == x.scalar_type(),
                        "slope_fx::frozen_linear: x, the weight and the bias have different dtypes");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == d_out), "slope_fx::frozen_linear: the bias has ",
                    bias->numel(), " elements, the weight ", d_out, " rows");
    for (int64_t i = 0; i < dims - 1; i++) sizes[i] = x.size(i);
    sizes[dims - 1] = d_out;
    return empty(sizes, dims, x.scalar_type());
}

/* The values, if they have the dtype of the weight and are no codes. */
std::optional<Tensor> typed(const Tensor &values, const std::optional<Tensor> &scales) {
    return scales ? std::nullopt : std::optional<Tensor>(values);
}

int64_t tokens_of(const Tensor &x) {
    int64_t tokens = 1;
    for (int64_t i = 0; i < x.dim() - 1; i++) tokens *= x.size(i);
    return tokens;
}

Tensor frozen_linear(Tensor x, Tensor values, Tensor mask, std::optional<Tensor> scales,
                     std::optional<Tensor> bias, std::optional<Tensor> lora_a,
                     std::optional<Tensor> lora_b, Form form) {
    Tensor y = output(x, values.size(0), typed(values, scales), bias, lora_a, lora_b, form);
    if (int64_t tokens = tokens_of(x))
        linears(x, {{y, values, mask, scales, bias, lora_a, lora_b}}, {form}, tokens);
    return y;
}

using Tensors = std::vector<Tensor>;

/* Several products with the same x. */
Tensors frozen_linears(Tensor x, Tensors values, Tensors masks, std::optional<Tensors> scales,
                       std::optional<Tensors> biases, std::optional<Tensors> lora_as,
                       std::optional<Tensors> lora_bs, Form forms) {
    auto of = [](const std::optional<Tensors> &tensors, size_t k) {
        return tensors ? std::optional<Tensor>(tensors->at(k)) : std::nullopt;
    };
    size_t length = values.empty() ? 0 : forms.size() / values.size();
    std::vector<Form> each;
    std::vector<Product> products;
    Tensors results;
    for (size_t k = 0; k < values.size(); k++) {
        each.emplace_back(forms.begin() + k * length, forms.begin() + (k + 1) * length);
        Product p{values[k], values[k], masks.at(k), of(scales, k), of(biases, k), of(lora_as, k), of(lora_bs, k)};
        p.y = output(x, values[k].size(0), typed(values[k], p.scales), p.bias, p.lora_a, p.lora_b, each[k]);
        products.push_back(p);
        results.push_back(p.y);
    }
    int64_t tokens = tokens_of(x);
    if (tokens && !products.empty()) linears(x, products, each, tokens);
    return results;
}

/* The rows of one weight in a tensor of a stack. */
Tensor part(Tensor stacked, int64_t group, int64_t groups) {
    int64_t rows = stacked.size(0) / groups;
    return torch::stable::narrow(stacked, 0, group * rows, rows);
}

std::optional<Tensor> part(const std::optional<Tensor> &stacked, int64_t group, int64_t groups) {
    return stacked ? std::optional<Tensor>(part(*stacked, group, groups)) : std::nullopt;
}

/* Each weight of a stack with its rows of x: those up to its offset, or x[group]. */
Tensor frozen_grouped_linear(Tensor x, Tensor values, Tensor mask, std::optional<Tensor> scales,
                             std::optional<Tensor> lora_a, std::optional<Tensor> lora_b,
                             std::optional<Tensor> offsets, int64_t groups, Form form) {
    Tensor y = output(x, values.size(0) / groups, typed(values, scales), std::nullopt, lora_a, lora_b, form);
    if (!tokens_of(x)) return y;
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    bool wide = offsets && offsets->scalar_type() == ScalarType::Long;
    if (offsets && !offsets->is_contiguous()) offsets = torch::stable::contiguous(*offsets);
    int64_t start = 0;
    for (int64_t group = 0; group < groups; group++) {
        Tensor inputs = x, outputs = y;
        int64_t rows;
        if (offsets) {
            const void *ends = offsets->const_data_ptr();
            int64_t end = wide ? ((const int64_t *)ends)[group] : ((const int32_t *)ends)[group];
            STD_TORCH_CHECK(end <= x.size(0), "slope_fx::frozen_grouped_linear: group ", group, " ends at row ",
                            end, " of ", x.size(0));
            rows = end - start;
            if (rows <= 0) continue;
            inputs = torch::stable::narrow(x, 0, start, rows);
            outputs = torch::stable::narrow(y, 0, start, rows);
            start = end;
        } else {
            rows = x.size(1);
            inputs = torch::stable::select(x, 0, group);
            outputs = torch::stable::select(y, 0, group);
        }
        linears(inputs,
                {{outputs, part(values, group, groups), part(mask, group, groups), part(scales, group, groups),
                  std::nullopt, part(lora_a, group, groups), part(lora_b, group, groups)}},
                {form}, rows);
    }
    if (offsets && start < x.size(0)) { /* rows of no group */
        Tensor rest = torch::stable::narrow(y, 0, start, x.size(0) - start);
        torch::stable::zero_(rest);
    }
    return y;
}

Tensor frozen_expand(Tensor values, Tensor mask, std::optional<Tensor> scales, std::optional<Tensor> lora_a,
                     std::optional<Tensor> lora_b, Form form) {
    static const ScalarType dtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                        ScalarType::Double};
    Tensor dense = expand(values, mask, scales, form, scales ? dtypes[form[DTYPE]] : values.scalar_type());
    if (!lora_a) return dense;
    int64_t groups = lora_a->size(0) / lora_b->size(1);
    for (int64_t group = 0; group < groups; group++)
        product(part(dense, group, groups), part(*lora_b, group, groups),
                torch::stable::transpose(part(*lora_a, group, groups), 0, 1), 1);
    return dense;
}

/* An instruction set that engine.c was compiled for and this CPU lacks. build.py lists them in SLOPE_NEEDS, and
 * compiles this file for any CPU. */
const char *missing() {
#define FEATURE(name) \
    if (!__builtin_cpu_supports(name)) return name;
    SLOPE_NEEDS
    return nullptr;
}

const char *const lacks = missing();

void unusable(StableIValue *, uint64_t, uint64_t) {
    STD_TORCH_CHECK(false, "libslope_fx.so was compiled for a CPU with ", lacks,
                    ", which this CPU lacks. Package the model on a machine with this CPU.");
}

struct Op {
    const char *name, *arguments;
    void (*kernel)(StableIValue *, uint64_t, uint64_t);
    bool here = true; /* not defined by slope_fx or the library of another package, with its kernel */
};
Op ops[] = {
    {"frozen_linear", "(Tensor x, Tensor values, Tensor forward_mask, Tensor? scales, Tensor? bias, "
                      "Tensor? lora_A, Tensor? lora_B, int[] form) -> Tensor", TORCH_BOX(&frozen_linear)},
    {"frozen_linears", "(Tensor x, Tensor[] values, Tensor[] forward_masks, Tensor[]? scales, Tensor[]? biases, "
                       "Tensor[]? lora_As, Tensor[]? lora_Bs, int[] forms) -> Tensor[]", TORCH_BOX(&frozen_linears)},
    {"frozen_grouped_linear", "(Tensor x, Tensor values, Tensor forward_mask, Tensor? scales, Tensor? lora_A, "
                              "Tensor? lora_B, Tensor? offsets, int groups, int[] form) -> Tensor",
     TORCH_BOX(&frozen_grouped_linear)},
    {"frozen_expand", "(Tensor values, Tensor forward_mask, Tensor? scales, Tensor? lora_A, Tensor? lora_B, "
                      "int[] form) -> Tensor", TORCH_BOX(&frozen_expand)},
};

}  // namespace

#ifdef SLOPE_DEFINE
STABLE_TORCH_LIBRARY_FRAGMENT(slope_fx, library) {
    for (Op &op : ops) {
        try {
            library.def((std::string(op.name) + op.arguments).c_str());
        } catch (const std::exception &) {
            op.here = false;
        }
    }
}
#endif

STABLE_TORCH_LIBRARY_IMPL(slope_fx, CPU, library) {
    if (lacks) /* an error from here would end the process */
        fprintf(stderr, "libslope_fx.so was compiled for a CPU with %s, which this CPU lacks.\n", lacks);
    for (const Op &op : ops)
        if (op.here) library.impl(op.name, lacks ? &unusable : op.kernel);
}
