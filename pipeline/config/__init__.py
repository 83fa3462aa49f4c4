"""What a recipe says: every field with its type, bound and one-line help. Start at `config.py`.

In: YAML files and `section.field=value`. Out: one frozen `Config`, or every mistake in one list.
Imports: errors, uri.
"""
