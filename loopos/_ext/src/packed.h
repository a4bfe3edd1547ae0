/* Panels of weights of 16 or 8 bits: [panel][line][32 outputs][2 or 4 numbers along k], zeros beyond the
   last output and the last number; the same at every instruction set. */
#ifndef LOOPOS_PACKED_H
#define LOOPOS_PACKED_H

#include "math.h.inc"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers of a lane of 32 bits are taken in the order of little-endian memory"
#endif

#define PANEL 32
/* Bytes of a line of a panel: 32 bits for each output. */
#define LINE 128
#define PER_LINE(bits) (32 / (bits))
/* Lines come in so many: those of a tile register of AMX. */
#define LINES_TOGETHER 16

INLINE long line_count(int bits, long k) {
    long deep = PER_LINE(bits) * LINES_TOGETHER;
    return (k + deep - 1) / deep * LINES_TOGETHER;
}

#if LANES == 8
/* Constants in memory: registers are the sums'. */
#define LANES_WITH(byte, lane) -1, -1, -1, 4 * (lane) + (byte)
#define TOP_BYTE(byte) \
    {LANES_WITH(byte, 0), LANES_WITH(byte, 1), LANES_WITH(byte, 2), LANES_WITH(byte, 3), \
     LANES_WITH(byte, 0), LANES_WITH(byte, 1), LANES_WITH(byte, 2), LANES_WITH(byte, 3)}
static const int8_t top_bytes[4][32] __attribute__((aligned(32))) = {TOP_BYTE(0), TOP_BYTE(1), TOP_BYTE(2),
                                                                      TOP_BYTE(3)};
static const uvec upper_halves = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                  0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
/* Byte `at` of each lane as its highest; its upper half alone. */
INLINE ivec to_top(int at, vec lanes) {
    if (at < 3) __asm__("vpshufb %1, %0, %0" : "+x"(lanes) : "m"(top_bytes[at]));
    return (ivec)lanes;
}
INLINE vec upper_half(vec lanes) {
    __asm__("vpand %1, %0, %0" : "+x"(lanes) : "m"(upper_halves));
    return lanes;
}
#else
INLINE ivec to_top(int at, vec lanes) { return (ivec)((uvec)lanes << (24 - 8 * at)); }
INLINE vec upper_half(vec lanes) { return (vec)((uvec)lanes & 0xffff0000u); }
#endif

/* Number `at` of each lane of a vector of weights of so many bits: bfloat16, int8, float. */
INLINE vec widen(int bits, int at, const char *from) {
    vec lanes = load((const float *)from);
    if (bits == 16) return at ? upper_half(lanes) : (vec)((uvec)lanes << 16);
    if (bits == 8) return __builtin_convertvector(to_top(at, lanes) >> 24, vec);
    return lanes;
}

/* LANES elements of a row whose sums are in: times the scales, with the bias, activated. */
INLINE vec finished(const loopos_packed *p, long column, vec v) {
    if (p->scales) v *= load_part(p->scales + column, p->n - column);
    if (p->bias) v += load_part(p->bias + column, p->n - column);
    return activate(p->activation, v);
}

/* The largest of so many numbers without their signs, as bits: these are ordered as the numbers are, NaN
   above infinity. */
INLINE uint32_t largest_bits(const float *x, long count) {
    ivec most = {0};
    for (long i = 0; i < count; i += LANES) {
        ivec bits = (ivec)load_part(x + i, count - i) & isplat(0x7fffffff);
        most = (ivec)where(bits > most, (vec)bits, (vec)most);
    }
    uint32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = (uint32_t)most[i] > largest ? (uint32_t)most[i] : largest;
    return largest;
}

#endif
