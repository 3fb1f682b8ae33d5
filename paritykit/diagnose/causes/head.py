"""x"""
def lm_head(s): return ()
def vocab_shard(s): return ()
