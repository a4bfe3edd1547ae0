"""The kernels for other people's Cython; what they mean is said in loopos.h.

``cimport loopos._ext.kernels`` finds the functions at the end at run time: nothing is linked, and
``loopos.get_include()`` is the only directory that the build needs.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t

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

    ctypedef struct loopos_table:
        const char *name
        int vector_floats
        int (*product)(int threads, const loopos_product *p) noexcept nogil

cdef const loopos_table *kernels() noexcept nogil
cdef int parallel(int threads, long count, size_t scratch_bytes, loopos_task task,
                  void *context) noexcept nogil
cdef void *take(size_t bytes) noexcept nogil
cdef void give(void *block) noexcept nogil
