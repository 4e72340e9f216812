"""`make fuzz`: three searches for what tests with chosen inputs miss, each for a share of the time.

    random       random_calls.py: calls of the public functions, of any dtype, layout and value, legal or not
    properties   properties.py: numbers and gradients against float64, on arrays that hypothesis draws
    arguments    bytes_calls.py: as random, steered by atheris towards lines of rlkern not yet reached
    kernels      bytes_calls.py and guarded.py: raw bits to the C++ kernels, at the edge of forbidden memory

`python tests/fuzz --help` lists the options. __main__.py runs the parts in child processes.
"""
