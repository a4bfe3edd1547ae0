/* Vectors of float32 as the compilers' own vector types: one source for every instruction set.
   Included once per level, with everything static. */
#ifndef LOOPOS_SIMD_H
#define LOOPOS_SIMD_H

#include "loopos.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Lanes of a vector, and the rows of a product that are held in registers at once. */
#if defined(__AVX512F__)
#define LANES 16
#if defined(LOOPOS_SPLIT) /* products in tiles of AMX */
#define TILE_ROWS 32
#else
#define TILE_ROWS 12
#endif
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define TILE_ROWS 12
#else
#define LANES 4
#define TILE_ROWS 6
#endif
#define TILE_VECTORS 2
#define TILE_COLUMNS (TILE_VECTORS * LANES)

#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__

/* Before a loop of a constant number of turns, at most n: all are written out. Clang takes "GCC
   unroll" for a factor, and leaves a loop of fewer turns as it is, with its sums in memory. */
#define PRAGMA_OF(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL(n) _Pragma("clang loop unroll(full)")
#else
#define UNROLL(n) PRAGMA_OF(GCC unroll n)
#endif
/* Before the loop over the depth of a tile. With 32 registers a turn is long enough, and Clang would
   fetch for four turns ahead until none is left for the sums. */
#if defined(__clang__) && defined(__aarch64__)
#define UNROLL_DEPTH _Pragma("clang loop unroll(disable)")
#else
#define UNROLL_DEPTH _Pragma("GCC unroll 4")
#endif
/* Within a turn: GCC would fetch the numbers of all rows first, and keep some sums in memory. */
#if defined(__aarch64__) && !defined(__clang__)
#define IN_ORDER(row) \
    do { \
        if ((row) % 3 == 2) __asm__ __volatile__("" : : : "memory"); \
    } while (0)
#else
#define IN_ORDER(row) ((void)(row))
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef float vec_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec v) { *(vec_unaligned *)p = v; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE ivec isplat(int32_t x) { return x - (ivec){0}; }

/* The first `count` lanes, the others 0; and their store. The sanitizers see into memcpy alone. */
#if LANES == 16 && !defined(LOOPOS_LOWERED) && !defined(__SANITIZE_ADDRESS__)
#define FIRST_LANES(count) ((__mmask16)((1u << (count)) - 1))
INLINE vec load_some(const float *p, long count) {
    return (vec)_mm512_maskz_loadu_ps(FIRST_LANES(count), p);
}
INLINE void store_some(float *p, vec v, long count) {
    _mm512_mask_storeu_ps(p, FIRST_LANES(count), (__m512)v);
}
#else
INLINE vec load_some(const float *p, long count) {
    vec v = {0};
    memcpy(&v, p, (size_t)count * 4);
    return v;
}
INLINE void store_some(float *p, vec v, long count) { memcpy(p, &v, (size_t)count * 4); }
#endif
INLINE vec load_part(const float *p, long count) { return count >= LANES ? load(p) : load_some(p, count); }
INLINE void store_part(float *p, vec v, long count) {
    if (count >= LANES)
        store(p, v);
    else
        store_some(p, v, count);
}

/* a where the mask is set (all bits), else b. */
INLINE vec where(ivec mask, vec a, vec b) {
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}
INLINE vec maximum(vec a, vec b) { return where(a > b, a, b); }
INLINE vec minimum(vec a, vec b) { return where(a < b, a, b); }

/* Lanes are added in a fixed order, halves first. */
INLINE float sum_lanes(vec v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}
INLINE float max_lanes(vec v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
}

/* One step of a transposition: exchange the blocks of `size` lanes off the diagonal. */
#if LANES == 16
#define LANE_LIST(f, s) \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s), \
        f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#elif LANES == 8
#define LANE_LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define LANE_LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#endif
/* GCC before 12 has the older of the two spellings only. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(low, high, f, s) __builtin_shufflevector(low, high, LANE_LIST(f, s))
#else
#define SHUFFLE(low, high, f, s) __builtin_shuffle(low, high, (ivec){LANE_LIST(f, s)})
#endif
#define LOW_LANE(e, s) ((e) & (s) ? LANES + (e) - (s) : (e))
#define HIGH_LANE(e, s) ((e) & (s) ? LANES + (e) : (e) + (s))
#define EXCHANGE(s) \
    UNROLL(16) for (int i = 0; i < LANES; i++) { \
        if (i & (s)) continue; \
        vec low = rows[i], high = rows[i + (s)]; \
        rows[i] = SHUFFLE(low, high, LOW_LANE, s); \
        rows[i + (s)] = SHUFFLE(low, high, HIGH_LANE, s); \
    }

/* Interleave the lower or the upper halves of each four lanes: one instruction, so better than the
   last two exchanges. */
#define LOW_HALVES(e, s) (((e) & ~3) + ((e) >> 1 & 1) + ((e) & 1) * LANES)
#define HIGH_HALVES(e, s) (LOW_HALVES(e, s) + 2)

/* A square of vectors whose halves are in place already: what is left of a transposition. */
INLINE void transpose_halves(vec rows[LANES]) {
#if LANES >= 16
    EXCHANGE(4)
#endif
    UNROLL(4) for (int i = 0; i < LANES; i += 4) {
        vec even_low = SHUFFLE(rows[i], rows[i + 2], LOW_HALVES, 0);
        vec even_high = SHUFFLE(rows[i], rows[i + 2], HIGH_HALVES, 0);
        vec odd_low = SHUFFLE(rows[i + 1], rows[i + 3], LOW_HALVES, 0);
        vec odd_high = SHUFFLE(rows[i + 1], rows[i + 3], HIGH_HALVES, 0);
        rows[i] = SHUFFLE(even_low, odd_low, LOW_HALVES, 0);
        rows[i + 1] = SHUFFLE(even_low, odd_low, HIGH_HALVES, 0);
        rows[i + 2] = SHUFFLE(even_high, odd_high, LOW_HALVES, 0);
        rows[i + 3] = SHUFFLE(even_high, odd_high, HIGH_HALVES, 0);
    }
}

/* Transpose a square of vectors in registers. */
INLINE void transpose(vec rows[LANES]) {
#if LANES >= 16
    EXCHANGE(8)
#elif LANES >= 8
    EXCHANGE(4)
#endif
    transpose_halves(rows);
}

/* An address that is to be in a register, and not summed up anew from others on the stack. */
#define KEEP(pointer) __asm__("" : "+r"(pointer))

#if LANES >= 8
/* Half of a vector from each of two places. */
INLINE vec load_halves(const float *low, const float *high) {
#if LANES == 16
    __m512d both = _mm512_castpd256_pd512(_mm256_loadu_pd((const double *)low));
    return (vec)_mm512_insertf64x4(both, _mm256_loadu_pd((const double *)high), 1);
#else
    __m256 both = _mm256_castps128_ps256(_mm_loadu_ps(low));
    return (vec)_mm256_insertf128_ps(both, _mm_loadu_ps(high), 1);
#endif
}
#endif

/* The transposed square of rows `step` apart: the first exchange is made by the loads, which leaves
   the port that shuffles to the others. */
INLINE void load_transposed(vec rows[LANES], const float *from, long step) {
#if LANES >= 8
    UNROLL(8) for (int i = 0; i < LANES / 2; i += 2) {
        const float *high = from + LANES / 2 * step;
        KEEP(high);
        rows[i] = load_halves(from, high);
        rows[i + LANES / 2] = load_halves(from + LANES / 2, high + LANES / 2);
        rows[i + 1] = load_halves(from + step, high + step);
        rows[i + 1 + LANES / 2] = load_halves(from + step + LANES / 2, high + step + LANES / 2);
        from += 2 * step;
        KEEP(from);
    }
    transpose_halves(rows);
#else
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * step);
    transpose(rows);
#endif
}

#endif
