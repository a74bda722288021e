// What tests set and ask. Mistakes in kernels are RuntimeErrors.
#include <cuda.h>
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>

#include "cuda.h"
#include "scheduler.h"

namespace py = pybind11;
using namespace emulator;

namespace {

py::tuple tuple(Dim d) { return py::make_tuple(d.x, d.y, d.z); }

Dim dim(const std::vector<uint32_t>& sizes) {
  if (sizes.size() != 3) throw std::invalid_argument("sizes must have 3 numbers");
  return {sizes[0], sizes[1], sizes[2]};
}

std::string demangled(const char* name) {
  int status;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = text ? text : name;
  free(text);
  return result;
}

py::dict describe(const Launch& launch) {
  const Statistics& s = launch.statistics;
  using namespace py::literals;
  return py::dict("kernel"_a = demangled(launch.kernel->name), "grid"_a = tuple(launch.grid),
                  "block"_a = tuple(launch.block), "cluster"_a = tuple(launch.cluster),
                  "dynamic_smem"_a = launch.dynamic_smem, "static_smem"_a = launch.kernel->static_smem,
                  "instructions"_a = s.instructions, "warp_operations"_a = s.warp_operations, "barriers"_a = s.barriers,
                  "global_read"_a = s.global_read, "global_written"_a = s.global_written,
                  "shared_accesses"_a = s.shared_accesses, "bank_conflicts"_a = s.bank_conflicts,
                  "sectors_read"_a = s.sectors_read, "sectors_written"_a = s.sectors_written);
}

py::list take_launches() {
  py::list result;
  for (const Launch& launch : launches) result.append(describe(launch));
  launches.clear();
  return result;
}

void set_schedule(const std::string& order, uint64_t seed) {
  if (order == "asc") {
    settings.order = Order::ascending;
  } else if (order == "desc") {
    settings.order = Order::descending;
  } else if (order == "random") {
    settings.order = Order::random;
  } else {
    throw std::invalid_argument("the schedule must be asc, desc or random, got " + order);
  }
  settings.seed = seed;
}

void set_watch(Watch what, bool yes) { settings.watches = yes ? settings.watches | what : settings.watches & ~what; }

Function& named(const std::string& name) {
  Function* function = find_function(name);
  if (!function) throw std::invalid_argument("there is no kernel " + name);
  return *function;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Error(error_text(error));
}

// Arguments: the bytes of each. Cluster: zeros where the launch doesn't say.
void launch_by_name(const std::string& name, const std::vector<uint32_t>& grid, const std::vector<uint32_t>& block,
                    std::vector<std::string> arguments, size_t dynamic_smem, const std::vector<uint32_t>& cluster) {
  Function& function = named(name);
  const Kernel& kernel = *function.kernel;
  if (arguments.size() != static_cast<size_t>(kernel.num_parameters)) {
    throw std::invalid_argument(
        format("%s takes %d arguments, got %zu", name.c_str(), kernel.num_parameters, arguments.size()));
  }
  std::vector<void*> pointers;
  for (int i = 0; i < kernel.num_parameters; ++i) {
    if (arguments[i].size() != kernel.parameters[i].size) {
      throw std::invalid_argument(format("argument %d of %s has %u bytes, got %zu", i, name.c_str(),
                                         kernel.parameters[i].size, arguments[i].size()));
    }
    pointers.push_back(arguments[i].data());
  }
  check(launch(&function, dim(grid), dim(block), pointers.data(), dynamic_smem, dim(cluster)));
}

// The bytes of a kernel's parameter.
py::bytes tensor_map(int type, uint64_t address, const std::vector<uint64_t>& sizes,
                     const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, int swizzle) {
  alignas(64) CUtensorMap map;
  const std::vector<uint32_t> ones(sizes.size(), 1);
  const CUresult error = cuTensorMapEncodeTiled(
      &map, static_cast<CUtensorMapDataType>(type), sizes.size(), reinterpret_cast<void*>(address), sizes.data(),
      strides.data(), box.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) throw std::invalid_argument("cuTensorMapEncodeTiled: invalid argument");
  return {reinterpret_cast<const char*>(&map), sizeof map};
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  install_fault_handler();
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 0);
  m.def("set_device", &set_device_model);
  m.def("count_conflicts", [](bool yes) { set_watch(kConflicts, yes); });
  m.def("count_sectors", [](bool yes) { set_watch(kSectors, yes); });
  m.def(
      "find_races",
      [](bool yes, bool allow_equal_writes) {
        set_watch(kRaces, yes);
        settings.allows_equal_writes = allow_equal_writes;
      },
      py::arg("yes"), py::arg("allow_equal_writes") = false);
  m.def("take_launches", &take_launches, "What was launched since the last call, with statistics.");
  m.def("add_buffer", [](uintptr_t begin, size_t bytes, const std::string& name) {
    add_buffer(reinterpret_cast<void*>(begin), bytes, name);
  });
  m.def("remove_buffer", [](uintptr_t begin) { return remove_buffer(reinterpret_cast<void*>(begin)); });
  m.def("launch", &launch_by_name, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("arguments"),
        py::arg("dynamic_smem"), py::arg("cluster") = std::vector<uint32_t>{0, 0, 0});
  m.def("allow_dynamic_smem",
        [](const std::string& name, size_t bytes) { check(allow_dynamic_smem(&named(name), bytes)); });
  m.def("release_stacks", &release_stacks);
  m.def("tensor_map", &tensor_map);
}
