// AMX: a processor's tiles of 16 rows of 64 bytes, and the product of two of them in bfloat16.
//
// `HardwareTiles` has the six instructions, `TwinTiles` the same in plain C++ with arrays for tiles: it runs the
// kernels on every machine and under sanitizers, and checks the hardware when it is first used. Assembly instead of
// intrinsics, because gcc's take literal numbers of tiles only and do not tell the compiler that a load reads memory;
// so neither needs a flag. The instructions follow Intel's Software Developer's Manual, volume 2.
#pragma once

#include "floats.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define FASTSSL_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastssl {

constexpr int kTileRows16 = 16;  // rows of a tile
constexpr int kTileWords = 16;   // 32-bit words of a row: float32 values, or pairs of bfloat16 along the depth
constexpr int kTilePalette = 1;  // the only one so far: eight tiles of 1 kB
constexpr int kTileCount = 8;

struct alignas(64) TileConfig {  // operand of LDTILECFG
  uint8_t palette = kTilePalette, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // All tiles have 16 rows of 64 bytes.
  static TileConfig whole() {
    TileConfig config;
    for (int t = 0; t < kTileCount; ++t) config.row_bytes[t] = 4 * kTileWords, config.rows[t] = kTileRows16;
    return config;
  }
};

#if defined(FASTSSL_TILES)

struct HardwareTiles {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  static void release() { asm volatile("tilerelease"); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* src, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(src), "r"(row_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* dst, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(dst), "r"(row_bytes), "i"(kTile) : "memory");
  }
  // kSum += kA kB, with kA [rows, pairs along the depth] and kB [pairs along the depth, columns].
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }

  // True where the processor has tiles of this size in bfloat16 and the operating system saves them.
  static bool exist() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE: XGETBV exists
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // BF16, TILE
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
    if (a >> 16 != 1024 || (b & 0xffff) != 64 || b >> 16 < kTileCount || (c & 0xffff) != kTileRows16) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a >> 17 & 3) == 3;  // states of the configuration and of the tiles
  }

  // Asks the operating system, which grants tiles on demand, for the whole process and those that it forks.
  static bool permitted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }
};

#endif

// The same instructions in plain C++, one state for each thread.
struct TwinTiles {
  struct State {
    bool configured;
    TileConfig config;
    uint32_t tiles[kTileCount][kTileRows16][kTileWords];
  };
  static State& state() {
    static thread_local State state{};
    return state;
  }

  static void configure(const TileConfig& config) { state() = {true, config, {}}; }
  static void release() { state() = {}; }
  template <int kTile>
  static void zero() {
    std::memset(state().tiles[kTile], 0, sizeof state().tiles[kTile]);
  }
  template <int kTile>
  static void load(const void* src, int64_t row_bytes) {
    zero<kTile>();
    for (int row = 0; row < state().config.rows[kTile]; ++row)
      std::memcpy(state().tiles[kTile][row], static_cast<const char*>(src) + row * row_bytes,
                  state().config.row_bytes[kTile]);
  }
  template <int kTile>
  static void store(void* dst, int64_t row_bytes) {
    for (int row = 0; row < state().config.rows[kTile]; ++row)
      std::memcpy(static_cast<char*>(dst) + row * row_bytes, state().tiles[kTile][row],
                  state().config.row_bytes[kTile]);
  }

  // A denormal number as zero.
  static float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
  static float first_of(uint32_t pair) { return flushed(bfloat16_to_float(uint16_t(pair))); }
  static float second_of(uint32_t pair) { return flushed(bfloat16_to_float(uint16_t(pair >> 16))); }

  // First and second products of the pairs are summed apart, each by fused multiply-adds from zero; then their sum is
  // added to the tile. Every operation rounds to nearest even, and takes and gives denormal numbers as zero.
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    State& s = state();
    const int depth = s.config.row_bytes[kA] / 4, columns = s.config.row_bytes[kSum] / 4;
    float b_first[kTileWords][kTileWords], b_second[kTileWords][kTileWords];
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < columns; ++n)
        b_first[k][n] = first_of(s.tiles[kB][k][n]), b_second[k][n] = second_of(s.tiles[kB][k][n]);
    for (int row = 0; row < s.config.rows[kSum]; ++row) {
      float first[kTileWords] = {}, second[kTileWords] = {};
      for (int k = 0; k < depth; ++k) {
        const float a_first = first_of(s.tiles[kA][row][k]), a_second = second_of(s.tiles[kA][row][k]);
        for (int n = 0; n < columns; ++n) {
          first[n] = flushed(std::fma(a_first, b_first[k][n], first[n]));
          second[n] = flushed(std::fma(a_second, b_second[k][n], second[n]));
        }
      }
      for (int n = 0; n < columns; ++n) {
        const float sum = flushed(first[n] + second[n]),
                    old = flushed(__builtin_bit_cast(float, s.tiles[kSum][row][n]));
        s.tiles[kSum][row][n] = __builtin_bit_cast(uint32_t, flushed(old + sum));
      }
    }
  }
};

// C[16 R, 16 N] = A[16 R, depth] B[depth, 16 N], or C += A B, with the depth in pairs, a multiple of 16, and all
// strides in words. Four sums, which hide the latency of the products, two tiles of A and two of B are all eight tiles.
template <typename Tiles, int R, int N, bool kAccumulate>
void multiply_tiles(int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c,
                    int64_t c_stride) {
  static_assert(R >= 1 && R <= 2 && N >= 1 && N <= 2);
  const int64_t a_bytes = 4 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
  const uint32_t* a_below = a + kTileRows16 * a_stride;
  float* c_below = c + kTileRows16 * c_stride;
  if constexpr (kAccumulate) {
    Tiles::template load<0>(c, c_bytes);
    if constexpr (N > 1) Tiles::template load<1>(c + kTileWords, c_bytes);
    if constexpr (R > 1) Tiles::template load<2>(c_below, c_bytes);
    if constexpr (R > 1 && N > 1) Tiles::template load<3>(c_below + kTileWords, c_bytes);
  } else {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    Tiles::template zero<2>();
    Tiles::template zero<3>();
  }
  for (int64_t d = 0; d < depth; d += kTileWords, b += kTileWords * b_stride) {
    Tiles::template load<4>(a + d, a_bytes);
    Tiles::template load<6>(b, b_bytes);
    Tiles::template multiply_add<0, 4, 6>();
    if constexpr (N > 1) {
      Tiles::template load<7>(b + kTileWords, b_bytes);
      Tiles::template multiply_add<1, 4, 7>();
    }
    if constexpr (R > 1) {
      Tiles::template load<5>(a_below + d, a_bytes);
      Tiles::template multiply_add<2, 5, 6>();
      if constexpr (N > 1) Tiles::template multiply_add<3, 5, 7>();
    }
  }
  Tiles::template store<0>(c, c_bytes);
  if constexpr (N > 1) Tiles::template store<1>(c + kTileWords, c_bytes);
  if constexpr (R > 1) Tiles::template store<2>(c_below, c_bytes);
  if constexpr (R > 1 && N > 1) Tiles::template store<3>(c_below + kTileWords, c_bytes);
}

// True where a product on tiles is right: of small integers, whose sums are exact in any order, beside the twin's.
template <typename Tiles>
bool multiplies_correctly() {
  constexpr int kSize = 2 * kTileWords;
  alignas(64) uint32_t a[kSize * kSize], b[kSize * kSize];
  alignas(64) float sums[2][kSize * kSize];
  uint32_t random = 1;
  const auto integer = [&] {
    random = random * 1664525 + 1013904223;
    return float(int32_t(random) >> 28);  // -8 … 7
  };
  for (uint32_t* pairs : {a, b})
    for (int i = 0; i < kSize * kSize; ++i)
      pairs[i] = float_to_bfloat16(integer()) | uint32_t(float_to_bfloat16(integer())) << 16;
  for (int i = 0; i < kSize * kSize; ++i) sums[0][i] = sums[1][i] = integer();
  const TileConfig config = TileConfig::whole();
  Tiles::configure(config);
  multiply_tiles<Tiles, 2, 2, true>(kSize, a, kSize, b, kSize, sums[0], kSize);
  Tiles::release();
  TwinTiles::configure(config);
  multiply_tiles<TwinTiles, 2, 2, true>(kSize, a, kSize, b, kSize, sums[1], kSize);
  TwinTiles::release();
  return std::memcmp(sums[0], sums[1], sizeof sums[0]) == 0;
}

// What multiplies blocks of bfloat16 in this library: nothing (they are computed in float32), AVX-512's dot product,
// tiles, or their twin. Python chooses once, when it loads the library; tests choose again.
enum class Bf16Products : int { kNone, kDot, kTiles, kTwin };

#if defined(__AVX512BF16__)
constexpr Bf16Products kDefaultBf16Products = Bf16Products::kDot;
#else
constexpr Bf16Products kDefaultBf16Products = Bf16Products::kNone;
#endif

inline std::atomic<Bf16Products> bf16_products{kDefaultBf16Products};

}  // namespace fastssl
