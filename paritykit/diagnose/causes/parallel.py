"""x"""
def tp_shard(s): return ()
def tp_reduce(s): return ()
def tp_bias(s): return ()
