def __getattr__(name):
    from fastkdtf._moved import find   # `teachers` was one module in 0.1.0
    return find('teachers', name)
