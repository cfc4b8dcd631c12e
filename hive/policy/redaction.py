"""What must not be read by others is taken out of a text, in one place (R076, C21).

Logs lose secrets; answers to clients lose paths, hosts and addresses, too. Prompts never get this
far: no message of hive is made from a request's content.
"""

import re

# user:password in a URL, up to the last @ before its path
_USERINFO = re.compile(r"(?<=://)[^/\s:]*:[^/\s]+(?=@)")
_BEARER = re.compile(r"""(?i:(?<=bearer\ ))[^\s"',;]{8,}""")  # shorter is prose
# name = value, name: value, "name": "value", 'name': ['value']
_NAMED = re.compile(
    r"""(\b(?:api[_-]?key|token|password|passwd|secret|cache_salt)["']?\s*[:=]\s*"""
    r"""(?!\[secret\])\[?["']?)([^\s"',;&\[\]]+)""",
    re.IGNORECASE,
)
_KNOWN = re.compile(
    r"""\bhive_(?:[A-Za-z0-9_-]{40,}           # hive's own keys …
                 |(?![a-z]+(?:_[a-z]+)+\b)[A-Za-z0-9_-]{16,})  # … but not a metric's name
      | \b(?:sk|pk|rk)-[A-Za-z0-9_-]{8,}       # keys of other vendors
      | \bhf_[A-Za-z0-9]{8,}
    """,
    re.VERBOSE,
)
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>)]+")
_ADDRESS = re.compile(
    r"""(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?(?!\w|\.\w)
      | \[?(?<![\w:.])(?=[0-9a-f:]*[0-9a-f])
        (?:(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}
          |(?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){0,6})?::(?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){0,6})?)
        (?![\w:])(?:\](?::\d+)?)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# An absolute path; hive's own API routes look alike and are no secret.
_PATH = re.compile(
    r"(?<![\w/.>])/+"
    r"(?!(?:v1|hive/v1|ui)(?!\.?[\w+@~-])"
    r"|(?:livez|readyz|metrics|health|tokenize|detokenize|rerank|score|pooling)(?!/|\.?[\w+@~-]))"
    r"[\w.+@~-]+(?:/[\w.+@~-]*)*"
)


def without_secrets(text: str) -> str:
    """For logs: keys, tokens and salts become [secret]."""
    text = _BEARER.sub("[secret]", _USERINFO.sub("[secret]", text))
    return _KNOWN.sub("[secret]", _NAMED.sub(r"\1[secret]", text))


def for_clients(text: str) -> str:
    """For answers: secrets, URLs, addresses and absolute paths are taken out."""
    text = without_secrets(_URL.sub("[url]", text))
    return _PATH.sub("[path]", _ADDRESS.sub("[address]", text))
