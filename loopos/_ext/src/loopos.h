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

/* Runs task `index` of a job; `scratch` belongs to the running thread for the time of the call. */
typedef void (*loopos_task)(void *context, long index, void *scratch);

/* Run `count` tasks on at most `threads` threads of the process's one pool, this one among them,
   each with `scratch_bytes` of its own memory, and wait for all. While another thread of the host
   program uses the pool, or inside a task, everything runs on the calling thread. */
int loopos_parallel(int threads, long count, size_t scratch_bytes, loopos_task task, void *context);

/* -- memory (arena.c) --------------------------------------------------------------------------- */

/* Aligned to 64 bytes; given back blocks are kept for the next that asks for such a size. */
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

typedef struct {
    const char *name;   /* of the instruction set */
    int vector_floats;  /* float32 lanes of a register */
    int (*product)(int threads, const loopos_product *p);
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
