"""x"""


def slot(s):
    return ()


def block_table(s):
    return ()


def stale(s):
    return ()
