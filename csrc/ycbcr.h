// YCbCr → RGB of bytes, full range as in JPEG, by the integers of libjpeg.
#pragma once

#include "lanes.h"

namespace fastssl {

// YCbCr → RGB of half a vector, 16 bits each, by the integers of libjpeg: 1.402, 0.34414, 0.71414, 1.772 in units of
// 2^-16, rounded, in forms that fit 16 bits.
struct ToRgb {
  Lanes centre = splat16(128), one = splat16(1), half = splat32(1 << 15);
  Lanes red = splat16(91881 - 65536), blue = splat16(116130 - 2 * 65536);
  Lanes green = splat32(int32_t((uint32_t(65536 - 46802) << 16) | uint16_t(-22554)));

  // y + (v·factor + 2^15 >> 16) for twice the chroma and a factor of 16 bits
  Lanes scaled(Lanes twice, Lanes factor) const { return halve16(add16(multiply_high(twice, factor), one)); }

  void operator()(Lanes& y, Lanes& u, Lanes& v) const {
    u = subtract16(u, centre);
    v = subtract16(v, centre);
    const Lanes twice_u = add16(u, u), twice_v = add16(v, v);
    const Lanes low = shift_right32(add32(multiply_pairs(zip16_low(u, v), green), half), 16);
    const Lanes high = shift_right32(add32(multiply_pairs(zip16_high(u, v), green), half), 16);
    const Lanes r = add16(add16(y, v), scaled(twice_v, red)), b = add16(add16(y, twice_u), scaled(twice_u, blue));
    const Lanes g = add16(subtract16(y, v), pack32(low, high));
    y = r;
    u = g;
    v = b;
  }
};

}  // namespace fastssl
