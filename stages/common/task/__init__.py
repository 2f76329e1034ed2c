"""What the answers of a model are: one frozen value per kind of task, behind one protocol.

This folder is the only place that knows the kinds `json`, `label`, `text`, `chat` and `tools`. Every stage,
the service, the gate and monitoring ask a `Task` (`protocol.py`) what they need: whether an answer may be
learned, its class, whether it is right, the metrics and which of them decides, the types of errors, and the
JSON schema of the answers. Whoever adds a kind writes a module with one more frozen `Task`, names it in
`kinds.py`, adds the keys that it reads to `settings.py`, and touches nothing else.
"""
