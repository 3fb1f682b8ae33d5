"""x"""


def pooling_type(s):
    return ()


def pooled_activation(s):
    return ()


def tuple_output(s):
    return ()
