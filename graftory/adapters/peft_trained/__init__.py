"""Methods whose layers are PEFT's own: it makes, computes, loads and saves them; we say which rows they see."""
