"""Data: from raw files to Arrow token shards and a manifest, a data order, and packed samples."""
