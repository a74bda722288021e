// The door of adam_ and grad_norm, the same for every device: checks the tensors once and turns them into plain
// pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "adam.h"
#include "check.h"
#include "tensors.h"

namespace bigkern {

// One tensor of a list, as messages name it; formatted only when it is printed.
struct Item {
  const char* list;
  size_t i;
};
inline std::ostream& operator<<(std::ostream& out, const Item& item) {
  return out << item.list << "[" << item.i << "]";
}

inline ScalarType check_dtype(const char* list, size_t i, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  BK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
               dtype == ScalarType::BFloat16,
           list, "[", i, "] must be torch.float32, float64, float16 or bfloat16, got ", name(dtype));
  return dtype;
}

template <class Argument>
void check_device(const Argument& argument, const Tensor& t, Device device) {
  BK_CHECK(device_of(t) == device, argument, " must be on ", name(device), " like the first tensor, got ",
           name(device_of(t)));
}

inline ScalarRef scalar_ref(const char* argument, const Tensor& t, Device device) {
  const ScalarType dtype = t.scalar_type();
  BK_CHECK(t.numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double), argument,
           " must be one torch.float32 or torch.float64, got ", name(dtype), " ", shape(t));
  check_device(argument, t, device);
  return {t.data_ptr(), dtype == ScalarType::Double};
}

inline ScalarRef scalar_ref(const char* argument, const std::optional<Tensor>& t, Device device) {
  return t.has_value() ? scalar_ref(argument, *t, device) : ScalarRef{};
}

// The tensors of a parameter group that stay the same from step to step. They are kept as tensors, not as pointers, so
// that whatever happens to one (p.data = ..., module.to(...)) is seen at the next step.
struct AdamLists {
  TensorList params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, master_params;
  std::vector<AdamTensor> seen{};  // where they were at the last call
};

// The gradients of a call, as handles: a stable Tensor each would take twice the time.
class GradList {
 public:
  explicit GradList(StableListHandle list) : list_(list) {
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
  }
  GradList(const GradList&) = delete;
  GradList& operator=(const GradList&) = delete;
  ~GradList() {
    for (const AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
    torch_delete_list(list_);
  }

  size_t size() const { return handles_.size(); }
  AtenTensorHandle handle(size_t i) const { return handles_[i]; }
  Tensor operator[](size_t i) const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handles_[i], &copy));
    return Tensor(copy);
  }

 private:
  StableListHandle list_;
  std::vector<AtenTensorHandle> handles_;
};

struct AdamCall {
  AdamOptions options{};
  std::vector<AdamTensor> tensors;
  Staging staging;
  Device device;
};

namespace detail {

// Where the i-th parameter's elements lie, once its tensors are checked; param is null where they can't be walked in
// memory order side by side.
inline AdamTensor checked_tensor(const AdamLists& lists, const GradList& grads, size_t i, bool amsgrad, Device device) {
  const Tensor& param = lists.params[i];
  const Tensor grad = grads[i];
  const Tensor* max_exp_avg_sq = amsgrad ? &lists.max_exp_avg_sqs[i] : nullptr;
  const Tensor* master_param = lists.master_params.empty() ? nullptr : &lists.master_params[i];
  const ScalarType dtype = check_dtype("params", i, param), state_dtype = lists.exp_avgs[i].scalar_type();
  const bool is_half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  BK_CHECK(state_dtype == dtype || (is_half && state_dtype == ScalarType::Float), "exp_avgs[", i, "] must be ",
           name(dtype), is_half ? " or torch.float32" : "", " like its parameter, got ", name(state_dtype));
  BK_CHECK(is_half || !master_param, "master_params[", i, "] is for float16 and bfloat16 parameters, got ",
           name(dtype));

  const auto item = [i](const char* list) { return Item{list, i}; };
  bool all_contiguous = param.is_contiguous(), all_like_param = true;
  const auto check = [&](const char* list, const Tensor& t, ScalarType want) {
    BK_CHECK(t.scalar_type() == want, list, "[", i, "] must have dtype ", name(want), ", got ", name(t.scalar_type()));
    BK_CHECK(same_sizes(t.get(), param.get()), list, "[", i, "] must have shape ", shape(param), ", got ", shape(t));
    check_device(item(list), t, device);
    all_contiguous = all_contiguous && t.is_contiguous();
    all_like_param = all_like_param && (all_contiguous || same_strides(t, param));
  };
  check_device(item("params"), param, device);
  check("grads", grad, dtype);
  check("exp_avgs", lists.exp_avgs[i], state_dtype);
  check("exp_avg_sqs", lists.exp_avg_sqs[i], state_dtype);
  if (max_exp_avg_sq) check("max_exp_avg_sqs", *max_exp_avg_sq, state_dtype);
  if (master_param) check("master_params", *master_param, ScalarType::Float);
  const ScalarRef step = scalar_ref("state_steps", lists.state_steps[i], device);

  const bool side_by_side = all_contiguous || (all_like_param && is_dense(param));
  return {side_by_side ? param.data_ptr() : nullptr,
          data_of(grads.handle(i)),
          lists.exp_avgs[i].data_ptr(),
          lists.exp_avg_sqs[i].data_ptr(),
          max_exp_avg_sq ? max_exp_avg_sq->data_ptr() : nullptr,
          master_param ? master_param->data_ptr() : nullptr,
          step,
          param.numel(),
          dtype,
          state_dtype};
}

// Reads a few tensors in a loop so tight that their cache misses overlap: a third less time for thousands of tiny
// tensors.
constexpr int64_t kTouched = 16;
inline void touch(const AdamLists& lists, const GradList& grads, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (const auto* list : {&lists.params, &lists.exp_avgs, &lists.exp_avg_sqs, &lists.state_steps}) {
      data_of((*list)[i].get());
    }
    data_of(grads.handle(i));
  }
}

// Whether a tensor is contiguous, on this device, with so many elements of this type.
inline bool is_plain(AtenTensorHandle t, int64_t want_numel, int32_t want_dtype, int32_t want_device_index) {
  int64_t numel;
  int32_t dtype, device_index;
  bool is_contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t, &numel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(t, &is_contiguous));
  return numel == want_numel && dtype == want_dtype && device_index == want_device_index && is_contiguous;
}

// Whether `seen`, where all is contiguous, still tells where the i-th tensors lie; then it gets the gradient's address.
// For thousands of tiny tensors, to read all that checked_tensor does would take longer than the step.
inline bool is_as_seen(const AdamLists& lists, const GradList& grads, size_t i, Device device, AdamTensor& seen) {
  const auto stays = [](const Tensor& t, const void* data) { return t.data_ptr() == data; };
  if (!seen.param || !stays(lists.params[i], seen.param) || !stays(lists.exp_avgs[i], seen.exp_avg) ||
      !stays(lists.exp_avg_sqs[i], seen.exp_avg_sq) || !stays(lists.state_steps[i], seen.step.data) ||
      (seen.max_exp_avg_sq && !stays(lists.max_exp_avg_sqs[i], seen.max_exp_avg_sq)) ||
      (seen.master_param && !stays(lists.master_params[i], seen.master_param))) {
    return false;
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(seen.param_dtype));
  seen.grad = data_of(grads.handle(i));
  return is_plain(lists.params[i].get(), seen.numel, dtype, device.index) &&
         is_plain(grads.handle(i), seen.numel, dtype, device.index) &&
         same_sizes(grads.handle(i), lists.params[i].get());
}

inline void stage(AdamCall& call, const AdamLists& lists, const GradList& grads, size_t i) {
  AdamTensor& t = call.tensors[i];
  t.param = call.staging.write(lists.params[i]);
  t.grad = call.staging.read(grads[i]);
  t.exp_avg = call.staging.write(lists.exp_avgs[i]);
  t.exp_avg_sq = call.staging.write(lists.exp_avg_sqs[i]);
  if (t.max_exp_avg_sq) t.max_exp_avg_sq = call.staging.write(lists.max_exp_avg_sqs[i]);
  if (t.master_param) t.master_param = call.staging.write(lists.master_params[i]);
}

}  // namespace detail

inline AdamOptions make_options(Device device, double lr, double beta1, double beta2, double weight_decay, double eps,
                                bool amsgrad, bool maximize, bool decoupled_weight_decay,
                                std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale,
                                std::optional<Tensor> found_inf, bool check_inf, std::optional<double> max_grad_norm,
                                std::optional<Tensor> grad_norm, std::optional<Tensor> grad_norm_out) {
  BK_CHECK(!check_inf || found_inf.has_value(), "check_inf needs found_inf, to report what it found, got None");
  BK_CHECK(!max_grad_norm.has_value() || *max_grad_norm >= 0.0, "max_grad_norm must be at least 0, got ",
           *max_grad_norm);
  return {lr,
          beta1,
          beta2,
          weight_decay,
          eps,
          amsgrad,
          maximize,
          decoupled_weight_decay,
          check_inf,
          max_grad_norm.value_or(INFINITY),
          scalar_ref("lr_tensor", lr_tensor, device),
          scalar_ref("grad_scale", grad_scale, device),
          scalar_ref("found_inf", found_inf, device),
          scalar_ref("grad_norm", grad_norm, device),
          scalar_ref("grad_norm_out", grad_norm_out, device)};
}

inline void add_tensors(AdamCall& call, AdamLists& lists, const GradList& grads) {
  const size_t n = lists.params.size();
  const auto check_length = [n](const char* list, size_t got, size_t want) {
    BK_CHECK(got == want, list, " must have ", want, " tensors for ", n, " params, got ", got);
  };
  check_length("grads", grads.size(), n);
  check_length("exp_avgs", lists.exp_avgs.size(), n);
  check_length("exp_avg_sqs", lists.exp_avg_sqs.size(), n);
  check_length("max_exp_avg_sqs", lists.max_exp_avg_sqs.size(), call.options.amsgrad ? n : 0);
  check_length("state_steps", lists.state_steps.size(), n);
  check_length("master_params", lists.master_params.size(), lists.master_params.empty() ? 0 : n);
  call.tensors.resize(n);
  lists.seen.resize(n);
  std::atomic<bool> has_failed{false};
  torch::stable::parallel_for(0, n, /*grain_size=*/128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      AdamTensor& seen = lists.seen[i];
      try {
        if ((i - begin) % detail::kTouched == 0) detail::touch(lists, grads, i, std::min(i + detail::kTouched, end));
        if (!detail::is_as_seen(lists, grads, i, call.device, seen)) {
          seen = detail::checked_tensor(lists, grads, i, call.options.amsgrad, call.device);
        }
      } catch (const std::exception&) {  // must not leave the thread
        has_failed = true;
      }
      call.tensors[i] = seen;
    }
  });
  for (size_t i = 0; i < n; ++i) {
    // Once more, in order: this raises the error of the first tensor that has one.
    if (has_failed) call.tensors[i] = detail::checked_tensor(lists, grads, i, call.options.amsgrad, call.device);
  }
  for (size_t i = 0; i < n; ++i) {
    if (!call.tensors[i].param && call.tensors[i].numel > 0) detail::stage(call, lists, grads, i);
  }
}

inline std::vector<Gradient> gradients_of(const std::vector<AdamTensor>& tensors) {
  std::vector<Gradient> gradients;
  for (const AdamTensor& t : tensors) gradients.push_back({t.grad, t.numel, t.param_dtype});
  return gradients;
}

// The arguments of grad_norm.
inline std::vector<Gradient> checked_gradients(const TensorList& grads, Staging& staging) {
  BK_CHECK(!grads.empty(), "grads must have at least one tensor");
  std::vector<Gradient> gradients;
  for (size_t i = 0; i < grads.size(); ++i) {
    const ScalarType dtype = check_dtype("grads", i, grads[i]);
    check_device(Item{"grads", i}, grads[i], device_of(grads[0]));
    const void* data = is_dense(grads[i]) ? grads[i].data_ptr() : staging.read(grads[i]);
    gradients.push_back({data, grads[i].numel(), dtype});
  }
  return gradients;
}

// The ops of one device, whose `run` gets the call once it is checked. Options are those of make_options.
template <void (*run)(const AdamCall&), class Options = decltype(&make_options)>
struct AdamOps;

template <void (*run)(const AdamCall&), class... Options>
struct AdamOps<run, AdamOptions (*)(Device, Options...)> {
  static void adam_(TensorList params, StableListHandle grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                    TensorList max_exp_avg_sqs, TensorList state_steps, TensorList master_params, Options... options) {
    AdamLists lists{std::move(params),          std::move(exp_avgs),    std::move(exp_avg_sqs),
                    std::move(max_exp_avg_sqs), std::move(state_steps), std::move(master_params)};
    step(lists, GradList(grads), options...);
  }

  // `kept` is what adam_keep returned.
  static void adam_kept_(int64_t kept, StableListHandle grads, Options... options) {
    step(*reinterpret_cast<AdamLists*>(kept), GradList(grads), options...);
  }

 private:
  static void step(AdamLists& lists, const GradList& grads, Options... options) {
    if (lists.params.empty()) return;
    AdamCall call;
    call.device = device_of(lists.params[0]);
    call.options = make_options(call.device, options...);
    add_tensors(call, lists, grads);
    run(call);
    call.staging.write_back();
  }
};

}  // namespace bigkern
