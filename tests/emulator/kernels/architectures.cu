// What a source is compiled to for several architectures: out = the architecture, whether its own instructions are
// there.
extern "C" __global__ void architecture(int* out) {
#ifdef __CUDA_ARCH__
  out[0] = __CUDA_ARCH__;
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  out[1] = 1;
#else
  out[1] = 0;
#endif
}
