// The choice of what multiplies blocks of bfloat16 in this library, made from Python (fastssl/ops/dispatch.py).
#include "tiles.h"

namespace fastssl {
namespace {

// Null where tiles can be used now, else the reason why not.
const char* why_no_tiles() {
#if defined(FASTSSL_TILES)
  if (!HardwareTiles::exist()) return "the processor or its operating system has no bfloat16 tiles";
  if (!HardwareTiles::permitted()) return "the operating system does not permit tiles (arch_prctl)";
  if (!multiplies_correctly<HardwareTiles>()) return "a product on tiles differs from the same in plain C++";
  return nullptr;
#else
  return "they were compiled for another processor, or by a compiler that does not know tiles (gcc 11, clang 12)";
#endif
}

}  // namespace
}  // namespace fastssl

// Chooses products, a Bf16Products as a number. Returns null, or the sentence why they cannot be used; then nothing
// changes.
extern "C" __attribute__((visibility("default"))) const char* fastssl_choose_bf16_products(int choice) {
  using namespace fastssl;
  const auto products = Bf16Products(choice);
  if (products == Bf16Products::kDot && kDefaultBf16Products != products) return "this level has no bf16 dot product";
  if (products == Bf16Products::kTiles)
    if (const char* reason = why_no_tiles()) return reason;
  bf16_products = products;
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) int fastssl_bf16_products() {
  return int(fastssl::bf16_products.load());
}
