"""The English names of languages, as OpenAI's answers give them."""

from __future__ import annotations

# Those that OpenAI lists for its transcription.
_NAMES = """
    af afrikaans  ar arabic  az azerbaijani  be belarusian  bg bulgarian  bs bosnian  ca catalan
    cs czech  cy welsh  da danish  de german  el greek  en english  es spanish  et estonian
    fa persian  fi finnish  fr french  gl galician  he hebrew  hi hindi  hr croatian  hu hungarian
    hy armenian  id indonesian  is icelandic  it italian  ja japanese  kk kazakh  kn kannada
    ko korean  lt lithuanian  lv latvian  mi maori  mk macedonian  mr marathi  ms malay  ne nepali
    nl dutch  no norwegian  pl polish  pt portuguese  ro romanian  ru russian  sk slovak
    sl slovenian  sr serbian  sv swedish  sw swahili  ta tamil  th thai  tl tagalog  tr turkish
    uk ukrainian  ur urdu  vi vietnamese  zh chinese
"""
_WORDS = _NAMES.split()
_BY_CODE = dict(zip(_WORDS[::2], _WORDS[1::2], strict=True))


def name_of(code: str) -> str:
    """The name of a language by its code, "english" of "en" and "en-GB"; an unknown code itself."""
    return _BY_CODE.get(code.split("-")[0].lower(), code)
