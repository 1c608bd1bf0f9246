"""The ops: each folder has an api, its definition, and implementations."""
