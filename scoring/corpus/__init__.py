"""From a corpus to token shards: find the files, read and check documents, tokenise, write."""
