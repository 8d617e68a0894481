// fastssl._C: facts about the build and the processor. It holds no kernels; those are called through torch's
// dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tiles.h"

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> levels() {
  std::vector<std::string> names;
  std::stringstream list(FASTSSL_LEVELS);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

// The highest level that the processor and its operating system support.
std::string processor_level() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#if defined(FASTSSL_TILES)
  if (avx2 && avx512 && fastssl::HardwareTiles::exist()) return "amx";
#endif
  if (avx2 && avx512) return "avx512";
  if (avx2) return "avx2";
#endif
  return "baseline";
}

std::string processor_maker() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

pybind11::dict build_facts() {
  using namespace pybind11::literals;
#if defined(__clang__)
  const char* compiler = "clang " __VERSION__;
#elif defined(__GNUC__)
  const char* compiler = "gcc " __VERSION__;
#else
  const char* compiler = "unknown compiler";
#endif
#if defined(FASTSSL_TILES)
  const bool tiles = true;
#else
  const bool tiles = false;
#endif
  return pybind11::dict("compiler"_a = compiler, "levels"_a = levels(), "tiles"_a = tiles,
                        "cuda"_a = bool(FASTSSL_CUDA));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the native part of fastssl: how it was built, and what the processor supports.";
  module.def("build_facts", &build_facts,
             "Compiler, instruction-set levels built, whether tiles (AMX) and the CUDA part were built.");
  module.def("processor_maker", &processor_maker, "Maker of the processor: 'intel', 'amd' or 'other'.");
  module.def("processor_level", &processor_level,
             "Highest level the processor supports: 'amx', 'avx512' (with bf16), 'avx2' or 'baseline'.");
}
