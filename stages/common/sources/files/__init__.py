"""The user's own files: bytes to text, text to raw records, raw records to conversation rows.

`encodings` → `formats` (`csv_dialect`, `csv_records`, `json_records`, `parquet_records`) → `shapes` → `rows`.
"""
