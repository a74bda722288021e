// Table of contents: every op of bigkern. The contract of each is the docstring of its public function in bigkern/ops/.
#include <torch/csrc/stable/library.h>

// Options of a step, the same for both ops that make one.
#define ADAM_OPTIONS                                                                                                \
  "*, float lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad=False, bool maximize=False, " \
  "bool decoupled_weight_decay=False, Tensor? lr_tensor=None, Tensor? grad_scale=None, "                            \
  "Tensor(g!)? found_inf=None, bool check_inf=False, float? max_grad_norm=None, Tensor? grad_norm=None, "           \
  "Tensor(h!)? grad_norm_out=None"

STABLE_TORCH_LIBRARY(bigkern, m) {
  // One Adam step of a parameter group. Lists run over the group's tensors; max_exp_avg_sqs and master_params may be
  // empty.
  m.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, Tensor(f!)[] master_params, " ADAM_OPTIONS ") -> ()");
  // The same for lists that are handed over once: long ones take the dispatcher longer than the step.
  m.def(
      "adam_keep(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
      "Tensor[] state_steps, Tensor[] master_params) -> int");
  m.def("adam_kept_(int kept, Tensor[] grads, " ADAM_OPTIONS ") -> ()");
  m.def("adam_forget(int kept) -> ()");
  m.def("grad_norm(Tensor[] grads, Tensor? grad_scale=None) -> Tensor");

  // What `bigkern info` asks the compiled libraries.
  m.def("cpu_isa() -> str");
  m.def("best_cpu_isa() -> str");
  m.def("cuda_toolkit() -> str");
}
