/* Brings weights from the order of a file into the order in which `step.c` multiplies them.

   Numbers stand in blocks of 16 outputs: 4 inputs of each output, then the next 4. 4-bit numbers
   share bytes: of each group of 32 inputs, the low halves hold inputs 0 to 3, 8 to 11 and so on.
   Outputs and inputs may be reordered and padded: `rows` and `columns` give the source's output
   or input for each place, or -1 for zeros.

   Plain numbers are rounded here to 8 or 4 bit, if the format asks for it. A GGUF file's blocks
   are taken apart as llama.cpp defines them (ggml-common.h), without changing a number. */

#include "vectors.h"

enum { GROUP = 32, LANES = 16 };
typedef enum { FLOAT32, FLOAT16, BFLOAT16, INT8, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K } Format;

static float float_of(const void *source, int format, size_t at) {
  if (format == FLOAT32) return ((const float *)source)[at];
  uint16_t bits = ((const uint16_t *)source)[at];
  float value[LANES] = {0};
  if (format == FLOAT16) {
    uint16_t halves[LANES] = {bits};
    return vstore(value, vhalf(halves)), value[0];
  }
  uint32_t wide = (uint32_t)bits << 16;
  return memcpy(value, &wide, 4), value[0];
}

/* Rounds to the nearest float16, ties to even. */
static uint16_t rounded_half(float value) {
  uint16_t halves[LANES];
  return vput_halves(halves, vset(value)), halves[0];
}

/* Returns the place of an 8-bit number. */
static size_t place8(int output, int input, int inputs) {
  return (((size_t)(output / LANES) * (inputs / 4) + input / 4) * LANES + output % LANES) * 4 + input % 4;
}

static void put4(uint8_t *numbers, int output, int input, int inputs, int number) {
  size_t group = (size_t)(output / LANES) * (inputs / GROUP) + input / GROUP;
  int quad = input % GROUP / 4;
  size_t at = (group * 4 + quad / 2) * 64 + output % LANES * 4 + input % 4;
  numbers[at] |= (uint8_t)(number << 4 * (quad & 1));
}

/* Finds a scale for 32 weights as whole numbers from -8 to 7. Of 19 roundings around the largest
   weight's, each with its optimal scale, the one with the smallest squared error is taken. */
static float scale_of_4_bits(const float *x, int8_t *chosen) {
  V a = vload(x), b = vload(x + LANES);
  float largest = 0.0f, best = -1.0f, scale = 0.0f;
  for (int i = 0; i < GROUP; i++)
    if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
  memset(chosen, 0, GROUP);
  if (fabsf(largest) < 0x1p-40f) return 0.0f; /* the scale would be 0 in 16 bits */
  for (int step = -9; step <= 9; step++) {
    V inverse = vset(-(8.0f + 0.1f * (float)step) / largest);
    V p = vmin(vset(7.0f), vmax(vset(-8.0f), vround(vmul(a, inverse))));
    V q = vmin(vset(7.0f), vmax(vset(-8.0f), vround(vmul(b, inverse))));
    float product = vsum(vfma(a, p, vmul(b, q))), square = vsum(vfma(p, p, vmul(q, q)));
    if (square == 0.0f || product * product <= best * square) continue;
    best = product * product / square, scale = product / square;
    vput_bytes(chosen, p), vput_bytes(chosen + LANES, q);
  }
  return scale;
}

/* Packs outputs `from` to `to` of a layer of plain numbers, [.., width] in the source. `room` is
   scratch memory for `inputs` floats. Returns 1 if a weight is not finite in `format`, else 0. */
int pack_plain(int format, const void *source, int source_format, int width, const int32_t *rows,
               const int32_t *columns, int inputs, int from, int to, uint8_t *numbers, void *scales,
               float *room) {
  for (int output = from; output < to; output++) {
    float largest = 0.0f;
    for (int i = 0; i < inputs; i++) {
      int column = columns ? columns[i] : i;
      float value = 0.0f;
      if (rows[output] >= 0 && column >= 0 && column < width)
        value = float_of(source, source_format, (size_t)rows[output] * (size_t)width + (size_t)column);
      if (!isfinite(value)) return 1;
      room[i] = value;
      largest = fabsf(value) > largest ? fabsf(value) : largest;
    }
    size_t block = (size_t)(output / LANES);
    int lane = output % LANES;
    if (format == INT8) {
      float scale = largest / 127.0f, inverse = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
      ((float *)scales)[output] = scale;
      for (int i = 0; i < inputs; i++)
        numbers[place8(output, i, inputs)] = (uint8_t)(int8_t)nearbyintf(room[i] * inverse);
    } else if (format == Q4_0) {
      for (int g = 0; g < inputs / GROUP; g++) {
        int8_t chosen[GROUP];
        float scale = scale_of_4_bits(room + g * GROUP, chosen);
        uint16_t half = rounded_half(scale);
        if ((half & 0x7c00) == 0x7c00) return 1;
        ((uint16_t *)scales)[(block * (inputs / GROUP) + g) * LANES + lane] = half;
        for (int i = 0; i < GROUP; i++) put4(numbers, output, g * GROUP + i, inputs, chosen[i] + 8);
      }
    } else {
      for (int i = 0; i < inputs; i++) {
        size_t single = (block * (size_t)inputs + (size_t)i) * LANES + lane;
        size_t paired = (block * (size_t)inputs + (size_t)(i & ~1)) * LANES + 2 * lane + (i & 1);
        if (format == FLOAT32) {
          ((float *)numbers)[single] = room[i];
          continue;
        }
        uint16_t bits = format == FLOAT16 ? rounded_half(room[i]) : bfloat16_bits(room[i]);
        uint16_t infinite = format == FLOAT16 ? 0x7c00 : 0x7f80;
        if ((bits & infinite) == infinite) return 1;
        ((uint16_t *)numbers)[format == FLOAT16 ? single : paired] = bits;
      }
    }
  }
  return 0;
}

static uint16_t bits_at(const uint8_t *p) {
  uint16_t bits;
  return memcpy(&bits, p, 2), bits;
}

/* Packs one row of a GGUF file's blocks: its numbers, its 16-bit scales, and parts of scales. */
static void pack_row(int format, const uint8_t *p, int output, int inputs, uint8_t *numbers,
                     uint16_t *scales, uint8_t *parts) {
  size_t block = (size_t)(output / LANES);
  int lane = output % LANES;
  for (int g = 0; format < Q4_K && g < inputs / GROUP; g++) {
    size_t group = block * (size_t)(inputs / GROUP) + (size_t)g;
    int halves = format == Q4_1 ? 2 : 1;
    for (int i = 0; i < halves; i++, p += 2) scales[(group * halves + i) * LANES + lane] = bits_at(p);
    for (int i = 0; i < GROUP; i++) {
      if (format == Q8_0) numbers[place8(output, g * GROUP + i, inputs)] = p[i];
      else put4(numbers, output, g * GROUP + i, inputs, i < 16 ? p[i] & 15 : p[i - 16] >> 4);
    }
    p += format == Q8_0 ? GROUP : GROUP / 2;
  }
  for (int s = 0; format == Q4_K && s < inputs / 256; s++, p += 144) {
    size_t whole = block * (size_t)(inputs / 256) + (size_t)s;
    const uint8_t *six = p + 4;
    for (int i = 0; i < 2; i++) scales[(whole * 2 + i) * LANES + lane] = bits_at(p + 2 * i);
    for (int g = 0; g < 8; g++) {
      size_t group = block * (size_t)(inputs / GROUP) + (size_t)(8 * s + g);
      int scale = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | (six[g - 4] >> 6) << 4;
      int low = g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | (six[g] >> 6) << 4;
      parts[group * 2 * LANES + lane] = (uint8_t)scale;
      parts[(group * 2 + 1) * LANES + lane] = (uint8_t)low;
      for (int i = 0; i < GROUP; i++) {
        int both = p[16 + g / 2 * 32 + i];
        put4(numbers, output, s * 256 + g * GROUP + i, inputs, g & 1 ? both >> 4 : both & 15);
      }
    }
  }
  for (int s = 0; format == Q6_K && s < inputs / 256; s++, p += 210) {
    scales[(block * (size_t)(inputs / 256) + (size_t)s) * LANES + lane] = bits_at(p + 208);
    for (int g = 0; g < 16; g++)
      parts[(block * (size_t)(inputs / 16) + (size_t)(16 * s + g)) * LANES + lane] = p[192 + g];
    for (int i = 0; i < 256; i++) {
      int half = i / 128, of = i % 128, l = of % 32;
      int low = p[64 * half + of % 64] >> (of < 64 ? 0 : 4) & 15;
      int high = p[128 + 32 * half + l] >> 2 * (of / 32) & 3;
      numbers[place8(output, s * 256 + i, inputs)] = (uint8_t)(low | high << 4);
    }
  }
}

/* Packs outputs `from` to `to` of a GGUF file's tensor, whose rows have `row_bytes` bytes each. */
void pack_blocks(int format, const uint8_t *source, int64_t row_bytes, const int32_t *rows, int inputs,
                 int from, int to, uint8_t *numbers, uint16_t *scales, uint8_t *parts) {
  for (int output = from; output < to; output++)
    if (rows[output] >= 0)
      pack_row(format, source + rows[output] * row_bytes, output, inputs, numbers, scales, parts);
}
