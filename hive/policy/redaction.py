"""What must not be read by others is taken out of a text, in one place (R076, C21).

Logs lose secrets; answers to clients lose paths, hosts and addresses, too. Prompts never get this
far: no message of hive is made from a request's content.
"""

import re

_SECRET = re.compile(
    r"""\bhive_[A-Za-z0-9_-]{16,}            # hive's own keys
      | \b(?:sk|pk|rk)-[A-Za-z0-9_-]{8,}     # keys of other vendors
      | \bhf_[A-Za-z0-9]{8,}
      | (?<=[Bb]earer\ )[^\s"',;]+
      | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)      # user:password in a URL
      | (?i:(?<=api_key=)|(?<=api-key:\ )|(?<=token=)|(?<=password=)|(?<=cache_salt":\ ")|(?<=cache_salt":"))[^\s"',;&]+
    """,
    re.VERBOSE,
)
_URL = re.compile(r"\b(?:https?|tcp|redis|postgresql|sqlite)(?:\+\w+)?://[^\s\"'<>)\]]+")
_ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?(?![\w.])")
# An absolute path; hive's own API routes look alike and are no secret.
_PATH = re.compile(
    r"(?<![\w/.:>])/(?!(?:v1|hive/v1|livez|readyz|metrics|ui|health|tokenize|detokenize|rerank|score|pooling)\b)"
    r"[\w.+@~-]+(?:/[\w.+@~-]*)*"
)


def without_secrets(text: str) -> str:
    """For logs: keys, tokens and salts become [secret]."""
    return _SECRET.sub("[secret]", text)


def for_clients(text: str) -> str:
    """For answers: secrets, URLs, addresses and absolute paths are taken out."""
    text = _URL.sub("[url]", _SECRET.sub("[secret]", text))
    return _PATH.sub("[path]", _ADDRESS.sub("[address]", text))
