"""Whose head a file of a study is, by its path: told where there is one simple reading, else asked for."""

from collections import Counter
import re

from support.cli import UserError

# Names that say of which study they are, so that nothing else in the path can be the person
STUDY_NAME = re.compile("|".join((
    r"(?<!\d)\d{3}_S_\d{4,5}(?!\d)|ADNI\d{3}S\d{4,5}(?!\d)",
    r"(?<![A-Za-z0-9])(?:AIBL|PPMI)_\d+(?=_MR_)",  # as LONI names files; PPMI_2 may be a part of a download
    # OASIS-1 to 4 (OAS1_0001_MR1, OAS30001_MR_d0129), NACC, Cam-CAN, HCP of ageing and development
    r"(?<![A-Za-z0-9])(?:OAS[12]_\d{4}|OAS[34]\d{4}|IXI\d{3}|NACC\d{6}|CC\d{6}|HC[AD]\d{7})(?!\d)",
    r"(?<![A-Za-z0-9])BraTS(?:\d{4}_\d{5}|\d\d_[A-Za-z0-9]+_[A-Za-z0-9]+|-[A-Za-z]+-\d{5})",
    r"NDAR(?:INV[A-Za-z0-9]{8}|[A-Z]{2}\d{3}[A-Z0-9]{3})(?![A-Za-z0-9])",  # ABCD; Healthy Brain Network
    r"(?<=[A-Za-z12]_)005[01]\d{3}(?!\d)",  # ABIDE: Caltech_0051456, UM_1_0050272
    r"(?<!\d)\d{7}(?=_2\d{4}_\d+_\d+(?!\d))")))  # UK Biobank: PERSON_FIELD_INSTANCE_ARRAY
BIDS_NAME = re.compile(r"(?<![A-Za-z0-9])sub-([A-Za-z0-9]+)(?=[_/]|$)")
SIMPLE_NAME = re.compile(r"[a-z]*\d{1,8}[a-z]?|[a-z]+")  # p01, a2, 17b, bert; not p01v2, 10s1a1, 00120120502
ENDING = re.compile(r"\.(nii|nii\.gz|mgz|hdr|img)$", re.IGNORECASE)
T1_NAMES = r"t1|t1w|t1n|unit1|mp-?rage|mpr\d?|spgr|fspgr"
OTHER_NAMES = (r"t2[a-z]*|t1(?:ce|c|gd|post|km|map|rho)|[a-z0-9]*flair|pdw?|dwi|dti|adc|bold|sbref|epi|fmri"
               r"|asl|cbf|swi|mra|tof|angio|pet|inv-?\d|phase(?:diff|\d)?|magnitude\d?|fieldmap|localizer"
               r"|scout")
# The words of a path that say when and how a head was scanned, not whose it is
NO_NAME = re.compile(
    rf"(?<![a-z0-9])(?:(?P<visit>(?:ses(?:sion)?|month|week|day|visit|year|wave|time-?point|time|tp|scan|run"
    r"|exam|repeat|follow-?up|fu|mr|v|y|w|m)[-_ ]?\d{1,3})|ses-(?:[a-z]+\d{0,2}|\d{1,8})|t0|anat(?:[-_]\d)?"
    r"|(?:19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d|baseline|bl|base|screening|initial|follow-?up|fu|pre|post|test"
    rf"|retest|mr|(?:acq|ce|desc|echo|rec|res|space|task)-[a-z0-9]+|{T1_NAMES}|{OTHER_NAMES})(?![a-z0-9])",
    re.IGNORECASE)
MAX_SESSIONS = 12  # of a person; where there are more, what was taken for visits may be people


def people_of(paths, pattern=None):
    """Tells whose head each file is, or refuses to: one person in two splits makes every result wrong.

    The person is the name of a well-known study or of BIDS, wherever it stands; or the one word that differs
    between the paths, but for visits and contrasts. `pattern`, a regular expression whose one group is the
    person, takes the place of all rules. Returns a list of texts, None where it finds nothing; UserError if
    there is not one simple reading of the paths, which are texts below the folder of the study."""
    if pattern is not None:
        try:
            return [(match := re.search(pattern, path)) and match[1] for path in paths]
        except (re.error, IndexError) as error:
            raise UserError(f"--person-pattern {pattern!r} cannot be used ({error}); give a regular "
                            "expression with one group, like 'patient_([0-9]+)'.") from error
    texts = [ENDING.sub("", path) for path in paths]
    # {key: spelling} of the names in each path. 002_S_0413 and ADNI002S0413 are one, as are P01 and p01.
    studies = [{re.sub("_|ADNI", "", match[0]): match[0] for match in STUDY_NAME.finditer(text)}
               for text in texts]
    bids = [{match[1].casefold(): match[0] for match in BIDS_NAME.finditer(text)} for text in texts]
    names, is_clear = (studies if any(studies) else bids), True
    if not any(names):
        names, is_clear = _differing_words(texts)
    is_clear = is_clear and all(len(name) == 1 for name in names)
    if paths and not (is_clear and (any(studies) or _are_simple(names))):
        raise UserError(f"It cannot be told whose heads these {len(paths)} sessions are "
                        f"({', '.join(paths[:3])}, ...). Give --person-pattern, a regular expression for the "
                        "paths whose one group is the person, such as '^([^/]+)/' or 'patient_([0-9]+)'.")
    spellings = {key: spelling for name in names[::-1] for key, spelling in name.items()}
    return [spellings[key] for name in names for key in name]


def _differing_words(texts):
    """The word of each path that differs between them, as {key: spelling}; whether it can only be a name."""
    words = [{word.casefold(): word for word in re.findall(r"[^\W_]+", NO_NAME.sub("/", text))}
             for text in texts]
    columns = list(zip(*words)) if len(set(map(len, words))) == 1 else []
    differing = [column for column in columns if len(set(column)) > 1] or columns[:1] * (len(texts) == 1)
    if len(differing) != 1:
        return words, False
    sessions = Counter(differing[0])
    visits = {match[0].casefold() for text in texts for match in NO_NAME.finditer(text) if match["visit"]}
    # Several numbered visits may be people (m01), unless some person has more than one.
    has_digits = any(re.search(r"\d", name) for name in sessions)
    are_visits = has_digits and len(visits) <= len(sessions) < len(texts)
    is_clear = (len(visits) < 2 or are_visits) and max(sessions.values()) <= MAX_SESSIONS
    return [{key: spellings[key]} for key, spellings in zip(differing[0], words)], is_clear


def _are_simple(names):
    """Whether no name has more in it than a person, and no two have one number: P1 and preP1, 1a and 1b."""
    keys = {key for name in names for key in name}
    digits = [found[0] for key in keys if (found := re.search(r"\d+", key))]
    for place in range(1, min(map(len, digits), default=1)):  # 00101, 00102, 00201: a person and a visit?
        people, visits = {number[:-place] for number in digits}, {number[-place:] for number in digits}
        first_visits = {person + min(visits) for person in people}.intersection(digits)
        # Where people are counted, the last digit is one of ten.
        if 1 < len(people) < len(digits) and len(visits) < 10 and len(first_visits) > len(people) / 2:
            return False
    return len(set(map(int, digits))) == len(digits) and all(map(SIMPLE_NAME.fullmatch, keys))
