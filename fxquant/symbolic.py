def trace_symbolically(model, args, kwargs):
    raise NotImplementedError("todo")
