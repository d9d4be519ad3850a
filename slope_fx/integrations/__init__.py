"""What other libraries need: callbacks that step the Schedule in their training loops, and PEFT."""
