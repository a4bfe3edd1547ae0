# Linear maps: forward, and the gradients of input, weight and bias.


def linear(x, w, b, activation, int threads):
    """Return ``y = act(x w^T + b)`` and the argument of the activation (None without one)."""
    cdef loopos_product p
    cdef int status
    p.a = matrix(x, "x", -1, -1)
    p.m, p.k = size_of(x, 0), size_of(x, 1)
    p.b = matrix(w, "w", -1, p.k)
    p.n = size_of(w, 0)
    p.bias = vector_or_null(b, "b", p.n)
    p.a_row, p.a_col, p.b_row, p.b_col = p.k, 1, 1, p.k
    p.activation = ACTIVATION_CODES[activation]
    y = make2(p.m, p.n)
    pre = None if activation is None else make2(p.m, p.n)
    p.c, p.c_row, p.accumulate = <float *>cnp.PyArray_DATA(y), p.n, 0
    p.pre = NULL if pre is None else <float *>cnp.PyArray_DATA(<cnp.ndarray>pre)
    with nogil:
        status = loopos_kernels().product(threads, &p)
    done(status)
    return y, pre


cdef plain_product(loopos_product *p, int threads):
    cdef int status
    p.bias, p.activation, p.pre = NULL, LOOPOS_NONE, NULL
    with nogil:
        status = loopos_kernels().product(threads, p)
    done(status)


def linear_dx(dy, w, dx, int threads):
    """Return ``dy w``, or add it into `dx` when that is given."""
    cdef loopos_product p
    p.a = matrix(dy, "dy", -1, -1)
    p.m, p.k = size_of(dy, 0), size_of(dy, 1)
    p.b = matrix(w, "w", p.k, -1)
    p.n = size_of(w, 1)
    p.accumulate = dx is not None
    if dx is None:
        dx = make2(p.m, p.n)
    p.c, p.c_row = matrix(dx, "dx", p.m, p.n, True), p.n
    p.a_row, p.a_col, p.b_row, p.b_col = p.k, 1, p.n, 1
    plain_product(&p, threads)
    return dx


def linear_dw(dy, x, dw, bint accumulate, int threads):
    """Write ``dy^T x`` into `dw`, or add it."""
    cdef loopos_product p
    p.a = matrix(dy, "dy", -1, -1)
    p.k, p.m = size_of(dy, 0), size_of(dy, 1)
    p.b = matrix(x, "x", p.k, -1)
    p.n = size_of(x, 1)
    p.c, p.c_row = matrix(dw, "dw", p.m, p.n, True), p.n
    p.accumulate = accumulate
    p.a_row, p.a_col, p.b_row, p.b_col = 1, p.m, p.n, 1
    plain_product(&p, threads)
