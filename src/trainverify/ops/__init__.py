"""The op table: one row per op gives it its meaning, once, for every algebra."""
