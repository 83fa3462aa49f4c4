"""The scores of all contenders, in tasks. Start at `tasks.py`.

In: what is asked (`request.py`), and contenders with their vectors. Out: results by score name.
Imports: card, embed, errors, evaluate, heartbeat, uri.
"""
