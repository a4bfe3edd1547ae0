# Linear maps: forward, and the gradients of input, weight and bias.


cdef cnp.ndarray forward_product(loopos_product *p, x, w, b):
    """Fill in ``y = x w^T + b`` and return `y`."""
    memset(p, 0, sizeof(p[0]))
    p.a = matrix(x, "x", -1, -1)
    p.m, p.k = size_of(x, 0), size_of(x, 1)
    p.b = matrix(w, "w", -1, p.k)
    p.n = size_of(w, 0)
    p.bias = vector_or_null(b, "b", p.n)
    p.a_row, p.a_col, p.b_row, p.b_col = p.k, 1, 1, p.k
    y = make2(p.m, p.n)
    p.c, p.c_row = <float *>cnp.PyArray_DATA(y), p.n
    return y


def linear(x, w, b, activation, int threads):
    """Return ``y = act(x w^T + b)`` and the argument of the activation (None without one)."""
    cdef loopos_product p
    y = forward_product(&p, x, w, b)
    p.activation = ACTIVATION_CODES[activation]
    pre = None if activation is None else make2(p.m, p.n)
    if pre is not None:
        p.pre = <float *>cnp.PyArray_DATA(<cnp.ndarray>pre)
    run(PRODUCT, threads, &p, sizeof(p))
    return y, pre


def linears(x, layers, activation, bint decoding, int threads):
    """Return ``act(x w^T + b)`` for each ``(w, b)`` of some layers."""
    cdef loopos_product[8] p
    cdef long count = 0
    cdef int status
    outputs = []
    for w, b in layers:
        outputs.append(forward_product(&p[count], x, w, b))
        p[count].activation = ACTIVATION_CODES[activation]
        count += 1
        if count == 8 or len(outputs) == len(layers):
            if decoding:
                run(DECODE_PRODUCTS, threads, p, count * sizeof(p[0]), count)
            else:
                with nogil:
                    status = loopos_kernels().products(threads, count, p)
                done(status)
            count = 0
    return outputs


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
