/* What attention is made of: exp, products of tiles, rows packed and fetched. */
#ifndef LOOPOS_ATTENTION_TILES_H
#define LOOPOS_ATTENTION_TILES_H

#include "tile.h"

/* -- vectors ------------------------------------------------------------------------------------ */

/* The larger; b where a is NaN. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vec)_mm_max_ps((__m128)a, (__m128)b);
#else
    return where(a > b, a, b);
#endif
}

/* x, but 0 where `guide` is less than `low`. */
INLINE vec zero_below(vec guide, float low, vec x) {
#if LANES == 16
    __mmask16 keep = _mm512_cmp_ps_mask((__m512)guide, _mm512_set1_ps(low), _CMP_NLT_UQ);
    return (vec)_mm512_maskz_mov_ps(keep, (__m512)x);
#else
    return (vec)(~(guide < splat(low)) & (ivec)x);
#endif
}

/* (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2. */
#define EXP_0 0x1.fffff8p-2f
#define EXP_1 0x1.55548ep-3f
#define EXP_2 0x1.555b5ep-5f
#define EXP_3 0x1.123c28p-7f
#define EXP_4 0x1.687a68p-10f

/* exp to about 1 ulp for x <= 88; 0 below -87.3, NaN of NaN. */
INLINE vec attention_exp(vec x) {
    vec shifted = x * 1.44269504f + 12582912.0f; /* the low bits of the sum: x / ln 2, rounded */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = r * EXP_4 + EXP_3;
    p = p * r + EXP_2;
    p = p * r + EXP_1;
    p = p * r + EXP_0;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vec power = (vec)(((ivec)shifted << 23) + 0x3F800000);
    return zero_below(x, -87.33654f, p * power);
}

INLINE ivec lane_numbers(void) {
    ivec v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

/* -- products of tiles -------------------------------------------------------------------------- */

enum tile_mode { TILE_FRESH, TILE_ADDED, TILE_SCALED };

/* c (n columns) = A B; or that added to c, or to c * factor. */
INLINE void attention_tile(int rows, int vectors, long k, const float *a, long a_row, long a_col,
                           const float *b, long b_row, float *c, long c_row, long n, int mode,
                           const vec *factor) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    int full = n == vectors * LANES;
    if (mode == TILE_FRESH) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++) acc[i][j] = (vec){0};
    } else if (mode == TILE_SCALED) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                acc[i][j] = load(c + i * c_row + j * LANES) * factor[j];
    } else if (full) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                acc[i][j] = load(c + i * c_row + j * LANES);
    } else {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                acc[i][j] = load_part(c + i * c_row + j * LANES, n - j * LANES);
    }
    tile_multiply(rows, vectors, k, a, a_row, a_col, b, b_row, acc);
    if (full) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                store(c + i * c_row + j * LANES, acc[i][j]);
    } else {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                store_part(c + i * c_row + j * LANES, acc[i][j], n - j * LANES);
    }
}

/* Tiles of up to TILE_ROWS rows; by_rows: rows of A are a_step apart, else its columns are. */
#define ATTENTION_TILES(name, vectors, by_rows) \
    static __attribute__((noinline)) void name( \
        int rows, long k, const float *a, long a_step, const float *b, long b_row, float *c, \
        long c_row, long n, int mode, const vec *factor) { \
        switch (rows) { \
            ATTENTION_CASES(vectors, by_rows) \
        } \
    }
#define ATTENTION_CASE(rows, vectors, by_rows) \
    case rows: \
        attention_tile(rows, vectors, k, a, by_rows ? a_step : 1, by_rows ? 1 : a_step, b, b_row, \
                       c, c_row, n, mode, factor); \
        break;
#define ATTENTION_CASES_6(v, r) \
    ATTENTION_CASE(1, v, r) ATTENTION_CASE(2, v, r) ATTENTION_CASE(3, v, r) \
    ATTENTION_CASE(4, v, r) ATTENTION_CASE(5, v, r) ATTENTION_CASE(6, v, r)
#if TILE_ROWS == 12
#define ATTENTION_CASES(v, r) \
    ATTENTION_CASES_6(v, r) \
    ATTENTION_CASE(7, v, r) ATTENTION_CASE(8, v, r) ATTENTION_CASE(9, v, r) \
    ATTENTION_CASE(10, v, r) ATTENTION_CASE(11, v, r) ATTENTION_CASE(12, v, r)
#else
#define ATTENTION_CASES(v, r) ATTENTION_CASES_6(v, r)
#endif
ATTENTION_TILES(by_rows_1, 1, 1)
ATTENTION_TILES(by_rows_2, 2, 1)
ATTENTION_TILES(by_columns_1, 1, 0)
ATTENTION_TILES(by_columns_2, 2, 0)

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long lanes_above(long n) { return (n + LANES - 1) / LANES * LANES; }

/* C[rows, width of `vectors`] from A[i, p] = a[i * a_step + p]. */
static void rows_times(long rows, int vectors, long k, const float *a, long a_step, const float *b,
                       long b_row, float *c, long c_row, int mode) {
    for (long i = 0; i < rows; i += TILE_ROWS) {
        int height = (int)least(rows - i, TILE_ROWS);
        (vectors == 2 ? by_rows_2 : by_rows_1)(height, k, a + i * a_step, a_step, b, b_row,
                                               c + i * c_row, c_row, vectors * LANES, mode, NULL);
    }
}

/* C[rows, n] from A[i, p] = a[i + p * a_step]. */
static void columns_times(long rows, int vectors, long k, const float *a, long a_step,
                          const float *b, long b_row, float *c, long c_row, long n, int mode,
                          const vec *factor) {
    for (long i = 0; i < rows; i += TILE_ROWS) {
        int height = (int)least(rows - i, TILE_ROWS);
        (vectors == 2 ? by_columns_2 : by_columns_1)(height, k, a + i, a_step, b, b_row,
                                                     c + i * c_row, c_row, n, mode, factor);
    }
}

/* -- blocks of rows ----------------------------------------------------------------------------- */

/* panel[p][j] = factor * x[j * row + p] for n <= width rows of d; 0 in the lanes beyond n. */
static void pack_lanes(const float *x, long row, long n, long d, float factor, int vectors,
                       float *RESTRICT panel) {
    long width = vectors * LANES;
    for (long j0 = 0; j0 < width; j0 += LANES)
        for (long p = 0; p < d; p += LANES) {
            long depth = least(d - p, LANES);
            vec rows[LANES];
            if (n - j0 >= LANES && depth == LANES) {
                UNROLL(16) for (int j = 0; j < LANES; j++) rows[j] =
                    load(x + (j0 + j) * row + p) * factor;
            } else {
                for (int j = 0; j < LANES; j++)
                    rows[j] = j0 + j < n ? load_part(x + (j0 + j) * row + p, depth) * factor
                                         : (vec){0};
            }
            transpose(rows);
            if (depth == LANES) {
                UNROLL(16) for (int i = 0; i < LANES; i++)
                    store(panel + (p + i) * width + j0, rows[i]);
            } else {
                for (int i = 0; i < depth; i++) store(panel + (p + i) * width + j0, rows[i]);
            }
        }
}

/* Rows of d, `row` apart, to rows of `padded`, zeros beyond d. */
static void copy_rows(const float *x, long row, long n, long d, float *RESTRICT to, long padded) {
    for (long i = 0; i < n; i++, x += row, to += padded)
        for (long p = 0; p < padded; p += LANES) store(to + p, load_part(x + p, most(d - p, 0)));
}

/* Ask for `n` rows of d that are wanted soon: they lie too far apart for the processor to guess. */
INLINE void fetch_rows(const float *x, long row, long n, long d) {
    for (long i = 0; i < n; i++, x += row)
        for (long p = 0; p < d; p += 16) __builtin_prefetch(x + p, 0, 2);
}

/* What the next task will touch, asked for bit by bit while this one computes. */
typedef struct {
    struct {
        const float *x;
        long row, rows;
    } parts[7];
    int count, part;
    long at, d;
} fetch_list;

INLINE void fetch_later(fetch_list *list, const float *x, long row, long rows) {
    list->parts[list->count].x = x;
    list->parts[list->count].row = row;
    list->parts[list->count++].rows = rows;
}

INLINE void fetch_some(fetch_list *list, long rows) {
    while (rows > 0 && list->part < list->count) {
        long row = list->parts[list->part].row, left = list->parts[list->part].rows - list->at;
        fetch_rows(list->parts[list->part].x + list->at * row, row, least(rows, left), list->d);
        list->at += least(rows, left);
        if (left <= rows) list->part++, list->at = 0;
        rows -= left;
    }
}

#endif
