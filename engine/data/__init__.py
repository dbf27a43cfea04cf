"""The data room: raw text -> Arrow token shards and a manifest -> a data order -> packed samples."""
