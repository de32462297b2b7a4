"""From files to token ids: corpora, vocabulary, the memory-mapped cache, and packed batches."""
