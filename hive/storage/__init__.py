"""What hive keeps about sessions and windows; bytes of KV blocks are files and not kept here."""
