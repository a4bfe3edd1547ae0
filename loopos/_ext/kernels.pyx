# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The door to the kernels: checks arrays, gives memory, lets go of the interpreter's lock.

Arrays are float32 (ids and offsets int32), C-contiguous. Another dtype is a TypeError, another
shape or layout a ValueError, both naming the argument. Results lie in memory that is reused.
"""

cimport cython
cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF

import os
from operator import index

import numpy as np

cnp.import_array()


# -- what is hidden in this module, and how others reach it ----------------------------------------


cdef extern from "loopos.h" nogil:
    int loopos_parallel(int threads, long count, size_t scratch_bytes, loopos_task task,
                        void *context) noexcept
    void *loopos_take(size_t bytes) noexcept
    void loopos_give(void *block) noexcept
    void loopos_arena_state(size_t *used, size_t *kept, size_t *peak) noexcept
    void loopos_arena_trim() noexcept
    const loopos_table *loopos_kernels() noexcept
    int loopos_levels(const loopos_table **levels, int capacity) noexcept
    int loopos_use_level(const char *name) noexcept


cdef extern from "loopos_import.h":
    int LOOPOS_API_VERSION
    size_t LOOPOS_STRUCT_BYTES
    const char *LOOPOS_API_NAME
    ctypedef struct loopos_api:
        int version
        size_t table_bytes
        size_t struct_bytes
        int (*parallel)(int, long, size_t, loopos_task, void *) noexcept nogil
        void *(*take)(size_t) noexcept nogil
        void (*give)(void *) noexcept nogil
        const loopos_table *(*kernels)() noexcept nogil


cdef const loopos_table *kernels() noexcept nogil:
    return loopos_kernels()


cdef int parallel(int threads, long count, size_t scratch_bytes, loopos_task task,
                  void *context) noexcept nogil:
    return loopos_parallel(threads, count, scratch_bytes, task, context)


cdef void *take(size_t bytes) noexcept nogil:
    return loopos_take(bytes)


cdef void give(void *block) noexcept nogil:
    loopos_give(block)


cdef loopos_api api
api.version, api.table_bytes = LOOPOS_API_VERSION, sizeof(loopos_table)
api.struct_bytes = LOOPOS_STRUCT_BYTES
api.parallel, api.take, api.give = loopos_parallel, loopos_take, loopos_give
api.kernels = loopos_kernels
_C_API = PyCapsule_New(&api, LOOPOS_API_NAME, NULL)

ACTIVATION_CODES = {
    None: LOOPOS_NONE, "gelu": LOOPOS_GELU, "gelu_tanh": LOOPOS_GELU_TANH,
    "relu": LOOPOS_RELU, "silu": LOOPOS_SILU, "tanh": LOOPOS_TANH,
}


include "repeat.pxi"


# -- memory ----------------------------------------------------------------------------------------


@cython.no_gc
cdef class Block:
    """Memory of the arena or of a recording, given back when the last array on it is gone."""

    cdef void *memory
    cdef Pool pool  # of the recording; its number there
    cdef long number

    def __dealloc__(self):
        if self.pool is not None:
            self.pool.free[self.number] = True
        elif self.memory is not NULL:
            loopos_give(self.memory)


cdef cnp.ndarray make(int ndim, cnp.npy_intp *shape):
    """Return an uninitialised float32 array."""
    cdef size_t count = 1, limit = <size_t>-1 // 2
    cdef int axis
    for axis in range(ndim):
        if shape[axis] and count > limit // <size_t>shape[axis] // 4:
            raise MemoryError(f"no memory for an array of shape {[shape[i] for i in range(ndim)]}")
        count *= <size_t>shape[axis]
    cdef Block block = Block.__new__(Block)
    if is_recorded():
        block.number = recorder.pool.take(4 * count if count else 4)
        block.pool = recorder.pool
        block.memory = <void *><size_t>block.pool.addresses[block.number]
    else:
        block.memory = loopos_take(4 * count if count else 4)
        if block.memory is NULL:
            raise MemoryError(f"no memory for {4 * count} bytes")
    cdef cnp.ndarray array = cnp.PyArray_SimpleNewFromData(
        ndim, shape, cnp.NPY_FLOAT32, block.memory
    )
    Py_INCREF(block)  # PyArray_SetBaseObject takes over a reference
    cnp.PyArray_SetBaseObject(array, block)
    return array


cdef cnp.ndarray make2(long rows, long columns):
    cdef cnp.npy_intp[2] shape
    shape[0] = rows
    shape[1] = columns
    return make(2, shape)


cdef cnp.ndarray make_like(cnp.ndarray array):
    return make(cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array))


def empty(shape):
    """Return an uninitialised float32 array of this shape."""
    cdef cnp.npy_intp[32] sizes
    cdef int axis = 0
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(shape) > 32:
        raise ValueError(f"shape: at most 32 axes, found {len(shape)}")
    for axis, size in enumerate(shape):
        if size < 0:
            raise ValueError(f"shape: no negative sizes, found {shape}")
        sizes[axis] = size
    return make(len(shape), sizes)


def arena_state():
    """Return (bytes in use, bytes kept for reuse, most bytes that were in use at once)."""
    cdef size_t used, kept, peak
    loopos_arena_state(&used, &kept, &peak)
    return used, kept, peak


def arena_trim():
    """Give back to the system what is kept for reuse."""
    loopos_arena_trim()


# -- checks ----------------------------------------------------------------------------------------


cdef check(object array, str name, int kind, str word, bint writable):
    if not isinstance(array, cnp.ndarray):
        raise TypeError(f"{name}: expected a NumPy array of {word}, found {type(array).__name__}")
    if cnp.PyArray_TYPE(<cnp.ndarray>array) != kind or not cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>array):
        raise TypeError(f"{name}: expected an array of {word}, found {array.dtype}")
    if not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>array) or not cnp.PyArray_ISALIGNED(<cnp.ndarray>array):
        raise ValueError(f"{name}: expected a C-contiguous array, found strides {array.strides}")
    if writable and not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>array):
        raise ValueError(f"{name}: is read-only and would be written to")
    if is_recorded():
        recorder.hold(array)


cdef wrong_shape(object array, str name, str expected):
    raise ValueError(f"{name}: expected shape {expected}, found {list(array.shape)}")


cdef float *floats(object array, str name, bint writable=False) except? NULL:
    """The data of a float32 array of any shape."""
    check(array, name, cnp.NPY_FLOAT32, "float32", writable)
    return <float *>cnp.PyArray_DATA(<cnp.ndarray>array)


cdef float *vector(object array, str name, long size, bint writable=False) except? NULL:
    """The data of a float32 array of one axis and this size (-1: any)."""
    cdef float *data = floats(array, name, writable)
    if cnp.PyArray_NDIM(<cnp.ndarray>array) != 1 or size not in (-1, cnp.PyArray_SIZE(<cnp.ndarray>array)):
        wrong_shape(array, name, f"[{'any' if size < 0 else size}]")
    return data


cdef float *matrix(object array, str name, long rows, long columns, bint writable=False) except? NULL:
    """The data of a float32 array of two axes and these sizes (-1: any)."""
    cdef float *data = floats(array, name, writable)
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(<cnp.ndarray>array)
    if (
        cnp.PyArray_NDIM(<cnp.ndarray>array) != 2
        or (rows >= 0 and shape[0] != rows)
        or (columns >= 0 and shape[1] != columns)
    ):
        wrong_shape(array, name, f"[{'any' if rows < 0 else rows}, {'any' if columns < 0 else columns}]")
    return data


cdef float *vector_or_null(object array, str name, long size, bint writable=False) except? NULL:
    """The same of what may be None: NULL then."""
    return NULL if array is None else vector(array, name, size, writable)


cdef float *matrix_or_null(object array, str name, long rows, long columns) except? NULL:
    """The same of what may be None: NULL then."""
    return NULL if array is None else matrix(array, name, rows, columns)


cdef int32_t *integers(object array, str name, long size) except? NULL:
    """The data of an int32 array of one axis and this size (-1: any)."""
    check(array, name, cnp.NPY_INT32, "int32", False)
    if cnp.PyArray_NDIM(<cnp.ndarray>array) != 1 or size not in (-1, cnp.PyArray_SIZE(<cnp.ndarray>array)):
        wrong_shape(array, name, f"[{'any' if size < 0 else size}]")
    return <int32_t *>cnp.PyArray_DATA(<cnp.ndarray>array)


cdef long size_of(object array, int axis):
    return cnp.PyArray_DIMS(<cnp.ndarray>array)[axis]


cdef no_scratch():
    raise MemoryError("no memory for the scratch of a kernel")


cdef done(int status):
    """What follows a kernel that is not called by `run`: what it does cannot be repeated."""
    if status:
        no_scratch()
    not_repeated()


# -- what stands between any array and a kernel -----------------------------------------------------


def single(**arrays):
    """Return whether the kernels take these: none is float64 (those are the reference's).

    Another dtype, or what is no NumPy array but a list or the array of another library, is a
    TypeError that names it. None is passed over: where an array may not be absent, the kernel's
    door says so.
    """
    cdef int kind
    for name, array in arrays.items():
        if array is None:
            continue
        if not isinstance(array, cnp.ndarray):
            raise TypeError(f"{name}: expected a NumPy array, found {type(array).__name__}")
        kind = cnp.PyArray_TYPE(<cnp.ndarray>array)
        if kind == cnp.NPY_FLOAT64:
            return False
        if kind != cnp.NPY_FLOAT32:
            raise TypeError(f"{name}: expected an array of float32, found {array.dtype}")
    return True


def contiguous(array):
    """Return the array itself when its elements lie in C order and aligned, else a copy.

    What is no NumPy array is returned as it is: the kernel's door knows its name, and says so.
    """
    if not isinstance(array, cnp.ndarray):
        return array
    if cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>array) and cnp.PyArray_ISALIGNED(<cnp.ndarray>array):
        return array
    not_repeated()
    return np.require(array, requirements=["C", "A"])


def all_contiguous(*arrays):
    """Return what `contiguous` gives for each."""
    return [contiguous(array) for array in arrays]


def as_int32(array, str name):
    """Return ids, offsets or rows as contiguous int32.

    What is no integer is a TypeError, what does not fit into 32 bits a ValueError.
    """
    if not isinstance(array, cnp.ndarray):
        raise TypeError(f"{name}: expected a NumPy array of integers, found {type(array).__name__}")
    if cnp.PyArray_TYPE(<cnp.ndarray>array) == cnp.NPY_INT32 and array.dtype.isnative:
        return contiguous(array)
    if cnp.PyArray_TYPE(<cnp.ndarray>array) != cnp.NPY_INT32:
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected an array of integers, found {array.dtype}")
        limits = np.iinfo(np.int32)
        if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
            raise ValueError(f"{name}: some do not fit into int32")
    not_repeated()
    return np.require(array, np.int32, ["C", "A"])


def row_numbers(array, str name, long limit):
    """Return row numbers as int32; negative ones count from the end, as in NumPy."""
    rows = as_int32(array, name)
    if rows.size and rows.min() < 0:
        not_repeated()
        rows = np.where(rows < 0, rows + np.int32(limit), rows)
    return rows


# -- instruction sets ------------------------------------------------------------------------------


def levels():
    """Return the names of the instruction sets that can run here, best first."""
    cdef const loopos_table *found[8]
    cdef int count = loopos_levels(found, 8)
    return [found[i].name.decode() for i in range(count)]


def level():
    """Return the name of the instruction set in use."""
    cdef const loopos_table *table = loopos_kernels()
    if table is NULL:
        raise RuntimeError("this processor is older than x86-64-v2")
    return table.name.decode()


def use_level(str name):
    """Use the kernels for this instruction set from now on; ValueError when they cannot run."""
    if loopos_use_level(name.encode()):
        raise ValueError(f"instruction set '{name}' cannot run here, expected one of {levels()}")


include "products.pxi"
include "packed.pxi"
include "losses.pxi"
include "attention.pxi"
include "elementwise.pxi"
