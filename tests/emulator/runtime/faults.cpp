// Host code that reads or writes device memory: on a card that ends the process, here it is an Error. The signal's
// handler lets the faulting instruction look like a call of a function that throws (-fnon-call-exceptions, build.py).
#include <signal.h>
#include <ucontext.h>

#include "emulator.h"

namespace emulator {

namespace {

struct sigaction previous;

// The stack may be aligned in any way.
[[noreturn]] __attribute__((force_align_arg_pointer)) void throw_fault() {
  throw Error("host code reads or writes device memory");
}

void handle(int signal, siginfo_t* info, void* context) {
  constexpr int kNoAddress = 0x80;  // SI_KERNEL: there can't be memory at that address
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (info->si_code != kNoAddress || current) {
    sigaction(signal, &previous, nullptr);  // the fault comes again
    return;
  }
  registers[REG_RSP] -= 8;
  *reinterpret_cast<int64_t*>(registers[REG_RSP]) = registers[REG_RIP] + 1;  // the unwinder looks at the byte before
  registers[REG_RIP] = reinterpret_cast<int64_t>(&throw_fault);
}

}  // namespace

void install_fault_handler() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous);
}

}  // namespace emulator
