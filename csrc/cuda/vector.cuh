// Several elements that one access moves.
#pragma once

#include <cstdint>

namespace bigkern {

// N neighbours, moved by one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <int N, class T>
__device__ Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <int N, class T>
__device__ void store(T* p, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(p) = vector;
}

template <int N, class T>
__device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T, N>) == 0;
}

}  // namespace bigkern
