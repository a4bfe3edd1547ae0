/* The kernels of loopos for C and Cython: ndarrays become pointers, nothing here knows Python.

   Matrices are row-major float32. Every kernel is a pure function of its arguments: results do not
   depend on `threads`, on how rows are batched, or on what ran before. A kernel returns 0, or -1
   when there was no memory for its scratch (nothing was written then that could be used).

   One table of kernels is compiled per instruction set; `loopos_kernels()` gives the best one that
   processor and operating system support.

   The functions declared here are hidden inside the extension module. Other modules reach them
   without linking: C through loopos_import.h, Cython through `cimport loopos._ext.kernels`. */
#ifndef LOOPOS_H
#define LOOPOS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* -- threads (pool.c) --------------------------------------------------------------------------- */

/* Runs task `index` of a job; `scratch` belongs to the running thread for the time of the call. What a task
   leaves there the thread's next task of this job finds; before the first its first `long` is 0. */
typedef void (*loopos_task)(void *context, long index, void *scratch);

/* Run `count` tasks on at most `threads` threads of the process's one pool, this one among them,
   each with `scratch_bytes` of its own memory, and wait for all. While another thread of the host
   program uses the pool, or inside a task, everything runs on the calling thread. */
int loopos_parallel(int threads, long count, size_t scratch_bytes, loopos_task task, void *context);

/* -- memory (arena.c) --------------------------------------------------------------------------- */

/* Aligned to 64 bytes; NULL where there is no memory. What is given back is kept for others. */
void *loopos_take(size_t bytes);
void loopos_give(void *block);
/* What is in use, what is kept free, the most that was in use at once; bytes. */
void loopos_arena_state(size_t *used, size_t *kept, size_t *peak);
/* Hand everything that is kept free back to the system. */
void loopos_arena_trim(void);

/* -- kernels ------------------------------------------------------------------------------------ */

enum loopos_activation {
    LOOPOS_NONE, LOOPOS_GELU, LOOPOS_GELU_TANH, LOOPOS_RELU, LOOPOS_SILU, LOOPOS_TANH
};

/* C = act(A B + bias), or C += A B. A[i, p] is a[i * a_row + p * a_col] (one of the two is 1),
   B likewise; C has rows of n, c_row apart. `bias` (n) and `pre` (as C, the argument of the
   activation) may be NULL. Each element is summed along k in blocks of a fixed size, in order. */
typedef struct {
    long m, n, k;
    const float *a;
    long a_row, a_col;
    const float *b;
    long b_row, b_col;
    float *c;
    long c_row;
    int accumulate;
    const float *bias;
    int activation;
    float *pre;
} loopos_product;

/* y [m, n] = act(x W^T scales + bias) for x [m, k] and a weight of `bits` 16 (bfloat16) or 8 (int8)
   in panels [ceil(n / 32)][line][32][32 / bits numbers along k], zeros beyond n and k, lines in multiples
   of 16. `scales` and `bias` (n) may be NULL. Sums are ordered as those of loopos_product; at level amx
   they have an order of their own, and beside int8 they are those of whole numbers, for which a row is
   rounded to 24 bits of its largest number. */
typedef struct {
    long m, n, k;
    const float *x;
    const void *panels;
    int bits;
    const float *scales, *bias;
    int activation;
    float *y;
} loopos_packed;

/* Such panels of w [n, k]: rounded to bfloat16, or to w / scales with scales (n) = max|w| / 127 of
   each row (1 for zeros; not finite where a weight is not). */
typedef struct {
    long n, k;
    const float *w;
    int bits;
    void *panels;
    float *scales;
} loopos_pack;

/* Rows of logits z [rows, columns], each scaled by `factor` (one over the temperature). The forward
   writes logp of the targets, lse and, unless NULL, entropy; without entropy, and given dlogp, it also
   replaces z by the gradient of dlogp * logp. The gradient by itself, given lse (and entropy with
   dentropy, which may be NULL), replaces z by that of dlogp * logp + dentropy * entropy. */
typedef struct {
    long rows, columns;
    float *z;
    const int32_t *targets;
    float factor;
    float *logp, *lse, *entropy;
    const float *dlogp, *dentropy;
} loopos_loss_rows;

/* Divergences KL(p || p_ref) of rows of logits z and z_ref [rows, columns], each scaled by `factor`.
   The forward writes kl. The gradient, given kl, replaces z by that of dkl * kl; z_ref is fixed. */
typedef struct {
    long rows, columns;
    float *z;
    const float *z_ref;
    float factor;
    float *kl;
    const float *dkl;
} loopos_kl_rows;

/* One token of each row of logits z [rows, columns], drawn with u (rows, in [0, 1)): ids, and logp at
   that temperature before truncation. Temperature 0 takes the first of the largest. Kept are the
   top_k largest and their equals (0: all), of these the fewest with a share of top_p, of these what
   is as likely as min_p times the likeliest. */
typedef struct {
    long rows, columns;
    const float *z;
    double temperature;
    long top_k;
    double top_p, min_p;
    const double *u;
    int32_t *ids;
    float *logp;
} loopos_sample;

/* Softmax attention of ragged sequences on themselves: sequence b is the tokens offsets[b] up to
   offsets[b + 1]; q, y and their gradients are [n, heads, d], k and v [n, kv_heads, d], lse (of the
   scaled scores) [n, heads]. The forward writes y and lse, the backward reads them and writes dq,
   dk, dv. Dropout of probabilities where `threshold` (rate * 2^32) is not 0. */
typedef struct {
    long n, heads, kv_heads, d, sequences;
    const float *q, *k, *v;
    float *y, *lse;
    const float *dy;
    float *dq, *dk, *dv;
    const int32_t *offsets;
    int causal;
    long window; /* a query sees keys closer than this; 0: all */
    float scale;
    uint64_t threshold, key;
    float kept;             /* factor of what is not dropped */
    const int64_t *samples; /* [sequences]; NULL: numbered */
} loopos_attention;

/* New tokens (q, y: [n, heads, d]; k, v: [n, kv_heads, d]; sequence b's from offsets[b]) take the last
   of the first lengths[b] positions of slot slots[b] of a cache [slots, capacity, kv_heads, d]: keys
   and values are written there, then each query sees the positions up to its own. */
typedef struct {
    long n, heads, kv_heads, d, sequences, capacity;
    const float *q, *k, *v;
    float *k_cache, *v_cache;
    float *y;
    const int32_t *offsets, *slots, *lengths;
    long window;
    float scale;
} loopos_cached;

/* Rotation of the pairs (x[i], x[i + half]) of q and k by positions[n] * inv_freq[half]. */
typedef struct {
    long n, heads, kv_heads, d, half;
    const float *q, *k;
    float *q_out, *k_out;
    const int32_t *positions;
    const double *inv_freq;
    int inverse;
} loopos_rope;

/* y = op(a, b, c) element by element, n of each; `kind` is an activation (or, for MAP_FUNCTION, 0 exp,
   1 tanh, 2 normal_cdf, 3 sigmoid, 4 exp_or_zero). y and z may be inputs. */
enum loopos_map_op {
    LOOPOS_MAP_ACTIVATION,          /* y = act(a) */
    LOOPOS_MAP_ACTIVATION_BACKWARD, /* y = b act'(a) */
    LOOPOS_MAP_SWIGLU,              /* y = silu(a) b */
    LOOPOS_MAP_SWIGLU_BACKWARD,     /* of c: y for a, z for b */
    LOOPOS_MAP_ADD,                 /* y = a + factor b */
    LOOPOS_MAP_SCALE,               /* y = factor a */
    LOOPOS_MAP_FILL,                /* y = factor */
    LOOPOS_MAP_FUNCTION
};
typedef struct {
    long n;
    int op, kind;
    float factor;
    const float *a, *b, *c;
    float *y, *z;
} loopos_map;

/* Layer norm (layer 1) or RMS norm (0) of rows. Forward: x, residual (or NULL; then s = x +
   residual is written) to y, mean, rstd. Gradient: x is s; dy and ds (or NULL) to dx (or NULL), and
   added to dg and db (or NULL). */
typedef struct {
    long rows, columns;
    int layer;
    float eps;
    const float *x, *residual, *g, *b;
    float *y, *s, *mean, *rstd;
    const float *dy, *ds;
    float *dx, *dg, *db;
} loopos_norm;

/* x[r] = table[ids[r]], or with `scatter` table[ids[r]] += x[r] in order of r. Rows of the table are
   table_row apart; without ids (NULL; no scatter) they are taken one after the other. */
typedef struct {
    long rows, columns, table_row;
    float *x, *table;
    const int32_t *ids;
    int scatter;
} loopos_rows;

/* y = x times 0 or `kept`, by bits keyed by (key, sample, position, column). */
typedef struct {
    long rows, columns;
    const float *x;
    float *y;
    const int64_t *samples, *positions; /* of each row */
    uint64_t key, threshold;            /* rate * 2^32 */
    float kept;
} loopos_dropout;

/* Tensors that are updated in one job of `tasks` tasks; each starts at its `first_task` and has one
   for every 16384 elements. AdamW: m and v, then p = p shrink - rate m / (sqrt(v) root + eps), where
   l2 p is added to the gradient first. Where `rows` is not NULL, rows of `columns` elements for which
   it holds 0 have neither gradient nor moments: they only shrink (l2 is 0 then). */
typedef struct {
    float *p, *m, *v;
    const float *g;
    long n, first_task;
    float rate, root, shrink, l2;
    const uint8_t *rows;
    long columns;
} loopos_tensor;
typedef struct {
    const loopos_tensor *tensors;
    long count, tasks;
    float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, eps;
} loopos_update;

/* One step of SGD on n elements: g = grad_scale g + decay p; with a buffer m (or NULL), m = momentum m
   + g (m = g on the first step), and the step is along m, with `nesterov` along g + momentum m. */
typedef struct {
    long n;
    float *p, *m;
    const float *g;
    float rate, momentum, decay, grad_scale;
    int nesterov, first_step;
} loopos_sgd;

typedef struct {
    const char *name;   /* of the instruction set */
    int vector_floats;  /* float32 lanes of a register */
    int (*product)(int threads, const loopos_product *p);
    /* Of one A: the same a, a_row, a_col, m and k. */
    int (*products)(int threads, long count, const loopos_product *p);
    int (*loss_rows)(int threads, const loopos_loss_rows *p);
    int (*loss_rows_gradient)(int threads, const loopos_loss_rows *p);
    int (*attention)(int threads, const loopos_attention *p);
    int (*attention_backward)(int threads, const loopos_attention *p);
    int (*attention_cached)(int threads, const loopos_cached *p);
    int (*rope)(int threads, const loopos_rope *p);
    int (*map)(int threads, const loopos_map *p);
    int (*column_sums)(int threads, long rows, long columns, const float *x, float *into);
    int (*norm)(int threads, const loopos_norm *p);
    int (*norm_gradient)(int threads, const loopos_norm *p);
    int (*rows)(int threads, const loopos_rows *p);
    int (*dropout)(int threads, const loopos_dropout *p);
    int (*adamw)(int threads, const loopos_update *p);
    int (*sum_squares)(int threads, const loopos_update *p, double *total);
    int (*packed_product)(int threads, const loopos_packed *p);
    int (*pack_weight)(int threads, const loopos_pack *p);
    int (*sample)(int threads, const loopos_sample *p);
    int (*kl_rows)(int threads, const loopos_kl_rows *p);
    int (*kl_rows_gradient)(int threads, const loopos_kl_rows *p);
    int (*sgd)(int threads, const loopos_sgd *p);
    /* The forward products of a step of decoding: as `products`, at level amx as those of v4, which take
       less time for few rows and sum in another order. */
    int (*decode_products)(int threads, long count, const loopos_product *p);
} loopos_table;

/* The table in use; NULL only on an x86-64 processor older than x86-64-v2. */
const loopos_table *loopos_kernels(void);
/* The tables that this machine can run, best first; returns how many there are. */
int loopos_levels(const loopos_table **levels, int capacity);
/* Use the table of this name from now on: 0, or -1 when this machine cannot. */
int loopos_use_level(const char *name);

#ifdef __cplusplus
}
#endif
#endif
