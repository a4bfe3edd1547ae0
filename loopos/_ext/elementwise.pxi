# What walks over arrays once: activations, sums, norms, rows of tables, dropout, updates.

from libc.stdlib cimport free, malloc

FUNCTION_CODES = {"exp": 0, "tanh": 1, "normal_cdf": 2, "sigmoid": 3, "exp_or_zero": 4}


cdef same(object array, str name, object like):
    """Raise ValueError unless both arrays have one shape."""
    if not isinstance(array, cnp.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, found {type(array).__name__}")
    if array.shape != like.shape:
        wrong_shape(array, name, str(list(like.shape)))


def vector_function(str name, x, int threads):
    """Return one of these functions of every element."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a = floats(x, "x")
    y = make_like(x)
    p.n, p.op, p.kind, p.y = x.size, LOOPOS_MAP_FUNCTION, FUNCTION_CODES[name], floats(y, "y")
    run(MAP, threads, &p, sizeof(p))
    return y


def activation(x, str kind, int threads):
    """Return ``act(x)``."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a = floats(x, "x")
    y = make_like(x)
    p.n, p.op, p.kind, p.y = x.size, LOOPOS_MAP_ACTIVATION, ACTIVATION_CODES[kind], floats(y, "y")
    run(MAP, threads, &p, sizeof(p))
    return y


def activation_backward(dy, x, str kind, int threads):
    """Return ``dy act'(x)``."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a, p.b = floats(x, "x"), floats(dy, "dy")
    same(dy, "dy", x)
    y = make_like(x)
    p.n, p.op, p.kind = x.size, LOOPOS_MAP_ACTIVATION_BACKWARD, ACTIVATION_CODES[kind]
    p.y = floats(y, "y")
    run(MAP, threads, &p, sizeof(p))
    return y


def swiglu(gate, up, int threads):
    """Return ``silu(gate) up``."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a, p.b = floats(gate, "gate"), floats(up, "up")
    same(up, "up", gate)
    y = make_like(gate)
    p.n, p.op, p.y = gate.size, LOOPOS_MAP_SWIGLU, floats(y, "y")
    run(MAP, threads, &p, sizeof(p))
    return y


def swiglu_backward(dy, gate, up, int threads):
    """Return the gradients of gate and up."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a, p.b, p.c = floats(gate, "gate"), floats(up, "up"), floats(dy, "dy")
    same(up, "up", gate)
    same(dy, "dy", gate)
    dgate, dup = make_like(gate), make_like(gate)
    p.n, p.op, p.y, p.z = gate.size, LOOPOS_MAP_SWIGLU_BACKWARD, floats(dgate, "y"), floats(dup, "z")
    run(MAP, threads, &p, sizeof(p))
    return dgate, dup


def add(a, b, float factor, into, int threads):
    """Return ``a + factor b``, in `into` when that is given."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a, p.b = floats(a, "a"), floats(b, "b")
    same(b, "b", a)
    if into is None:
        into = make_like(a)
    same(into, "into", a)
    p.n, p.op, p.factor, p.y = a.size, LOOPOS_MAP_ADD, factor, floats(into, "into", True)
    run(MAP, threads, &p, sizeof(p))
    return into


def scale(a, float factor, into, int threads):
    """Return ``factor a``, in `into` when that is given."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.a = floats(a, "a")
    if into is None:
        into = make_like(a)
    same(into, "into", a)
    p.n, p.op, p.factor, p.y = a.size, LOOPOS_MAP_SCALE, factor, floats(into, "into", True)
    run(MAP, threads, &p, sizeof(p))
    return into


def fill(into, float value, int threads):
    """Set every element."""
    cdef loopos_map p
    memset(&p, 0, sizeof(p))
    p.y = floats(into, "into", True)
    p.n, p.op, p.factor = into.size, LOOPOS_MAP_FILL, value
    run(MAP, threads, &p, sizeof(p))


def column_sums(x, into, int threads):
    """Add the sum over the rows of ``x`` to `into`."""
    cdef int status
    cdef const float *data = matrix(x, "dy", -1, -1)
    cdef long rows = size_of(x, 0), columns = size_of(x, 1)
    cdef float *to = vector(into, "db", columns, True)
    with nogil:
        status = loopos_kernels().column_sums(threads, rows, columns, data, to)
    done(status)


def norm(x, residual, g, b, bint layer, float eps, int threads):
    """Return (y, s, mean or None, rstd) of layer norm or, without `layer`, RMS norm."""
    cdef loopos_norm p
    memset(&p, 0, sizeof(p))
    p.x = matrix(x, "x", -1, -1)
    p.rows, p.columns, p.layer, p.eps = size_of(x, 0), size_of(x, 1), layer, eps
    p.residual = matrix_or_null(residual, "residual", p.rows, p.columns)
    p.g, p.b = vector(g, "g", p.columns), vector_or_null(b, "b", p.columns)
    y = make2(p.rows, p.columns)
    s = x if residual is None else make2(p.rows, p.columns)
    mean = make2(p.rows, 1) if layer else None
    rstd = make2(p.rows, 1)
    p.y, p.s, p.rstd = floats(y, "y"), floats(s, "s"), floats(rstd, "rstd")
    p.mean = floats(mean, "mean") if layer else NULL
    run(NORM, threads, &p, sizeof(p))
    return y, s, mean, rstd


def norm_backward(dy, s, g, mean, rstd, ds, dg, db, bint need_dx, int threads):
    """Return the gradient of ``s`` (or None), add to `dg` and `db`; RMS norm where `mean` is None."""
    cdef loopos_norm p
    cdef int status
    p.x = matrix(s, "s", -1, -1)
    p.rows, p.columns, p.layer = size_of(s, 0), size_of(s, 1), mean is not None
    p.dy, p.ds = matrix(dy, "dy", p.rows, p.columns), matrix_or_null(ds, "ds", p.rows, p.columns)
    p.g = vector(g, "g", p.columns)
    p.mean, p.rstd = matrix_or_null(mean, "mean", p.rows, 1), matrix(rstd, "rstd", p.rows, 1)
    p.dg = vector_or_null(dg, "dg", p.columns, True)
    p.db = vector_or_null(db, "db", p.columns, True)
    dx = make2(p.rows, p.columns) if need_dx else None
    p.dx = floats(dx, "dx") if need_dx else NULL
    with nogil:
        status = loopos_kernels().norm_gradient(threads, &p)
    done(status)
    return dx


cdef set_rows(loopos_rows *p, ids, long limit):
    """Set the ids; one outside of the table is an IndexError."""
    cdef long r
    p.table_row = p.columns
    p.ids = integers(ids, "ids", -1)
    p.rows = size_of(ids, 0)
    for r in range(p.rows):
        if not 0 <= p.ids[r] < limit:
            raise IndexError(f"ids: {p.ids[r]} is outside of {limit} rows")


def take_rows(table, ids, int threads):
    """Return ``table[ids]`` of a table with two axes."""
    cdef loopos_rows p
    memset(&p, 0, sizeof(p))
    p.table = matrix(table, "table", -1, -1)
    p.columns = size_of(table, 1)
    set_rows(&p, ids, size_of(table, 0))
    y = make2(p.rows, p.columns)
    p.x = floats(y, "y")
    run(ROWS, threads, &p, sizeof(p))
    return y


def split_columns(x, sizes, int threads):
    """Return so many columns of ``x`` after so many others, each as an array of its own."""
    cdef loopos_rows p
    cdef float *data = matrix(x, "x", -1, -1)
    cdef long size
    sizes = [index(given) for given in sizes]
    if sum(sizes) != size_of(x, 1) or min(sizes, default=0) < 0:
        raise ValueError(f"sizes: expected {size_of(x, 1)} columns in all, found {sizes}")
    parts = []
    for size in sizes:
        memset(&p, 0, sizeof(p))
        part = make2(size_of(x, 0), size)
        p.rows, p.columns, p.table, p.table_row = size_of(x, 0), size, data, size_of(x, 1)
        p.x = floats(part, "y")
        run(ROWS, threads, &p, sizeof(p))
        parts.append(part)
        data += size
    return parts


def add_rows(x, ids, table, int threads):
    """Add ``x[r]`` to ``table[ids[r]]``, in order of r."""
    cdef loopos_rows p
    cdef int status
    p.table = matrix(table, "dtable", -1, -1, True)
    p.columns, p.scatter = size_of(table, 1), 1
    set_rows(&p, ids, size_of(table, 0))
    p.x = matrix(x, "dy", p.rows, p.columns)
    with nogil:
        status = loopos_kernels().rows(threads, &p)
    done(status)


cdef int64_t *longs(object array, str name, long size) except? NULL:
    check(array, name, cnp.NPY_INT64, "int64", False)
    if cnp.PyArray_NDIM(<cnp.ndarray>array) != 1 or cnp.PyArray_SIZE(<cnp.ndarray>array) != size:
        wrong_shape(array, name, f"[{size}]")
    return <int64_t *>cnp.PyArray_DATA(<cnp.ndarray>array)


def dropout(x, double rate, uint64_t key, samples, positions, int threads):
    """Return `x` with channels dropped; `samples` and `positions` (int64) name each row."""
    cdef loopos_dropout p
    cdef int status
    p.x = matrix(x, "x", -1, -1)
    p.rows, p.columns, p.key = size_of(x, 0), size_of(x, 1), key
    p.samples, p.positions = longs(samples, "samples", p.rows), longs(positions, "positions", p.rows)
    p.threshold, p.kept = <uint64_t>round(rate * 4294967296.0), <float>(1.0 / (1.0 - rate))
    y = make2(p.rows, p.columns)
    p.y = floats(y, "y")
    with nogil:
        status = loopos_kernels().dropout(threads, &p)
    done(status)
    return y


cdef class Tensors:
    """Tensors that are walked through in one job."""

    cdef loopos_tensor *tensors
    cdef loopos_update update
    cdef object arrays  # keeps them alive

    def __dealloc__(self):
        free(self.tensors)

    def __init__(self, long count):
        self.tensors = <loopos_tensor *>malloc(max(1, count) * sizeof(loopos_tensor))
        if self.tensors is NULL:
            raise MemoryError("no memory for a list of tensors")
        self.update.tensors, self.update.count, self.update.tasks = self.tensors, 0, 0
        self.arrays = []

    cdef loopos_tensor *append(self, gradient, str name) except NULL:
        cdef loopos_tensor *tensor = &self.tensors[self.update.count]
        tensor.g, tensor.n = floats(gradient, name), gradient.size
        tensor.first_task = self.update.tasks
        if tensor.n:
            self.update.count += 1
            self.update.tasks += (tensor.n + 16383) // 16384
        self.arrays.append(gradient)
        return tensor


def adamw(tensors, double beta1, double beta2, double eps, double grad_scale, bint decoupled, int threads):
    """One AdamW step of many tensors in place: (p, g, m, v, learning rate, weight decay, step, rows).

    `rows` is None, or a bool for each row: whether its gradient or its moments may differ from 0.
    """
    cdef Tensors job = Tensors(len(tensors))
    cdef loopos_tensor *tensor
    cdef const uint8_t[::1] used
    cdef int status
    cdef double rate, decay
    cdef long step
    for p, g, m, v, rate, decay, step, rows in tensors:
        floats(p, "p", True)
        for name, array in (("g", g), ("m", m), ("v", v)):
            same(array, name, p)
        tensor = job.append(g, "g")
        tensor.p, tensor.m, tensor.v = floats(p, "p", True), floats(m, "m", True), floats(v, "v", True)
        tensor.rate = <float>(rate / (1.0 - beta1 ** step))
        tensor.root = <float>(1.0 / (1.0 - beta2 ** step) ** 0.5)
        tensor.shrink = <float>(1.0 - rate * decay) if decoupled else 1.0
        tensor.l2 = 0.0 if decoupled else <float>decay
        tensor.rows, tensor.columns = NULL, 0
        if rows is not None and tensor.l2 == 0.0 and tensor.n:
            if rows.shape != p.shape[:1] or rows.dtype != bool:
                raise ValueError(f"rows: expected bool[{len(p)}], found {rows.dtype}{list(rows.shape)}")
            used = rows.view("uint8")
            tensor.rows, tensor.columns = &used[0], tensor.n // len(rows)
            job.arrays.append(rows)
    job.update.grad_scale, job.update.eps = <float>grad_scale, <float>eps
    job.update.beta1, job.update.one_minus_beta1 = <float>beta1, <float>(1.0 - beta1)
    job.update.beta2, job.update.one_minus_beta2 = <float>beta2, <float>(1.0 - beta2)
    with nogil:
        status = loopos_kernels().adamw(threads, &job.update)
    done(status)


def sgd(
    p, g, m, double rate, double momentum, double decay, bint nesterov, bint first_step,
    double grad_scale, int threads,
):
    """One step of SGD in place, with the momentum's buffer `m` or None."""
    cdef loopos_sgd u
    cdef int status
    u.p, u.g, u.n = floats(p, "p", True), floats(g, "g"), p.size
    same(g, "g", p)
    u.m = NULL
    if m is not None:
        same(m, "momentum_buffer", p)
        u.m = floats(m, "momentum_buffer", True)
    u.rate, u.momentum, u.decay, u.grad_scale = rate, momentum, decay, grad_scale
    u.nesterov, u.first_step = nesterov, first_step
    with nogil:
        status = loopos_kernels().sgd(threads, &u)
    done(status)


def sum_squares(arrays, int threads):
    """Return the sum of the squares of all elements of all arrays."""
    cdef Tensors job = Tensors(len(arrays))
    cdef double total = 0
    cdef int status
    for array in arrays:
        job.append(array, "arrays")
    with nogil:
        status = loopos_kernels().sum_squares(threads, &job.update, &total)
    done(status)
    return total
