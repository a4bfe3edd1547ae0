"""The kernels for other people's Cython; what they mean is said in loopos.h.

``cimport loopos._ext.kernels`` finds the functions at the end at run time: nothing is linked, and
``loopos.get_include()`` is the only directory that the build needs.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "loopos.h" nogil:
    ctypedef void (*loopos_task)(void *context, long index, void *scratch) noexcept nogil

    enum loopos_activation:
        LOOPOS_NONE
        LOOPOS_GELU
        LOOPOS_GELU_TANH
        LOOPOS_RELU
        LOOPOS_SILU
        LOOPOS_TANH

    ctypedef struct loopos_product:
        long m
        long n
        long k
        const float *a
        long a_row
        long a_col
        const float *b
        long b_row
        long b_col
        float *c
        long c_row
        int accumulate
        const float *bias
        int activation
        float *pre

    ctypedef struct loopos_packed:
        long m
        long n
        long k
        const float *x
        const void *panels
        int bits
        const float *scales
        const float *bias
        int activation
        float *y

    ctypedef struct loopos_pack:
        long n
        long k
        const float *w
        int bits
        void *panels
        float *scales

    ctypedef struct loopos_loss_rows:
        long rows
        long columns
        float *z
        const int32_t *targets
        float factor
        float *logp
        float *lse
        float *entropy
        const float *dlogp
        const float *dentropy

    ctypedef struct loopos_kl_rows:
        long rows
        long columns
        float *z
        const float *z_ref
        float factor
        float *kl
        const float *dkl

    ctypedef struct loopos_sample:
        long rows
        long columns
        const float *z
        double temperature
        long top_k
        double top_p
        double min_p
        const double *u
        int32_t *ids
        float *logp

    ctypedef struct loopos_attention:
        long n
        long heads
        long kv_heads
        long d
        long sequences
        const float *q
        const float *k
        const float *v
        float *y
        float *lse
        const float *dy
        float *dq
        float *dk
        float *dv
        const int32_t *offsets
        int causal
        long window
        float scale
        uint64_t threshold
        uint64_t key
        float kept
        const int64_t *samples

    ctypedef struct loopos_cached:
        long n
        long heads
        long kv_heads
        long d
        long sequences
        long capacity
        const float *q
        const float *k
        const float *v
        float *k_cache
        float *v_cache
        float *y
        const int32_t *offsets
        const int32_t *slots
        const int32_t *lengths
        long window
        float scale

    ctypedef struct loopos_rope:
        long n
        long heads
        long kv_heads
        long d
        long half
        const float *q
        const float *k
        float *q_out
        float *k_out
        const int32_t *positions
        const double *inv_freq
        int inverse

    enum loopos_map_op:
        LOOPOS_MAP_ACTIVATION
        LOOPOS_MAP_ACTIVATION_BACKWARD
        LOOPOS_MAP_SWIGLU
        LOOPOS_MAP_SWIGLU_BACKWARD
        LOOPOS_MAP_ADD
        LOOPOS_MAP_SCALE
        LOOPOS_MAP_FILL
        LOOPOS_MAP_FUNCTION

    ctypedef struct loopos_map:
        long n
        int op
        int kind
        float factor
        const float *a
        const float *b
        const float *c
        float *y
        float *z

    ctypedef struct loopos_norm:
        long rows
        long columns
        int layer
        float eps
        const float *x
        const float *residual
        const float *g
        const float *b
        float *y
        float *s
        float *mean
        float *rstd
        const float *dy
        const float *ds
        float *dx
        float *dg
        float *db

    ctypedef struct loopos_rows:
        long rows
        long columns
        long table_row
        float *x
        float *table
        const int32_t *ids
        int scatter

    ctypedef struct loopos_dropout:
        long rows
        long columns
        const float *x
        float *y
        const int64_t *samples
        const int64_t *positions
        uint64_t key
        uint64_t threshold
        float kept

    ctypedef struct loopos_tensor:
        float *p
        float *m
        float *v
        const float *g
        long n
        long first_task
        float rate
        float root
        float shrink
        float l2
        const uint8_t *rows
        long columns

    ctypedef struct loopos_update:
        const loopos_tensor *tensors
        long count
        long tasks
        float grad_scale
        float beta1
        float beta2
        float one_minus_beta1
        float one_minus_beta2
        float eps

    ctypedef struct loopos_sgd:
        long n
        float *p
        float *m
        const float *g
        float rate
        float momentum
        float decay
        float grad_scale
        int nesterov
        int first_step

    ctypedef struct loopos_table:
        const char *name
        int vector_floats
        int (*product)(int threads, const loopos_product *p) noexcept nogil
        int (*products)(int threads, long count, const loopos_product *p) noexcept nogil
        int (*loss_rows)(int threads, const loopos_loss_rows *p) noexcept nogil
        int (*loss_rows_gradient)(int threads, const loopos_loss_rows *p) noexcept nogil
        int (*attention)(int threads, const loopos_attention *p) noexcept nogil
        int (*attention_backward)(int threads, const loopos_attention *p) noexcept nogil
        int (*attention_cached)(int threads, const loopos_cached *p) noexcept nogil
        int (*rope)(int threads, const loopos_rope *p) noexcept nogil
        int (*map)(int threads, const loopos_map *p) noexcept nogil
        int (*column_sums)(int threads, long rows, long columns, const float *x,
                           float *into) noexcept nogil
        int (*norm)(int threads, const loopos_norm *p) noexcept nogil
        int (*norm_gradient)(int threads, const loopos_norm *p) noexcept nogil
        int (*rows)(int threads, const loopos_rows *p) noexcept nogil
        int (*dropout)(int threads, const loopos_dropout *p) noexcept nogil
        int (*adamw)(int threads, const loopos_update *p) noexcept nogil
        int (*sum_squares)(int threads, const loopos_update *p, double *total) noexcept nogil
        int (*packed_product)(int threads, const loopos_packed *p) noexcept nogil
        int (*pack_weight)(int threads, const loopos_pack *p) noexcept nogil
        int (*sample)(int threads, const loopos_sample *p) noexcept nogil
        int (*kl_rows)(int threads, const loopos_kl_rows *p) noexcept nogil
        int (*kl_rows_gradient)(int threads, const loopos_kl_rows *p) noexcept nogil
        int (*sgd)(int threads, const loopos_sgd *p) noexcept nogil
        int (*decode_products)(int threads, long count, const loopos_product *p) noexcept nogil

cdef const loopos_table *kernels() noexcept nogil
cdef int parallel(int threads, long count, size_t scratch_bytes, loopos_task task,
                  void *context) noexcept nogil
cdef void *take(size_t bytes) noexcept nogil
cdef void give(void *block) noexcept nogil
