// Buffers, as long as the workspace lives; a thread has one that is kept from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace bigkern {

class Workspace {
 public:
  // This thread's, with all of its buffers free.
  static Workspace& of_this_thread() {
    thread_local Workspace workspace;
    workspace.taken_ = 0;
    return workspace;
  }

  // The same for what a call of this thread shares with the threads that help it.
  static Workspace& of_this_call() {
    thread_local Workspace workspace;
    workspace.taken_ = 0;
    return workspace;
  }

  // Room for n elements, uninitialized, on a cache line; always the same memory for the same order of calls.
  template <class T>
  T* take(int64_t n) {
    if (taken_ == buffers_.size()) buffers_.emplace_back();
    Buffer& buffer = buffers_[taken_++];
    const size_t bytes = n * sizeof(T);
    if (buffer.size < bytes) {
      buffer.data.reset();
      buffer.data.reset(::operator new(bytes, kAlignment));
      buffer.size = bytes;
    }
    return static_cast<T*>(buffer.data.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  struct Buffer {
    std::unique_ptr<void, Delete> data;
    size_t size = 0;
  };
  std::vector<Buffer> buffers_;
  size_t taken_ = 0;
};

}  // namespace bigkern
