"""Whose head a file of a study is, by its path: understood, or refused with the possible readings.

One person in two splits makes every result on held-out people wrong, so nothing is guessed here.
"""

from collections import Counter, namedtuple
import re

from support.cli import UserError

# How studies name people, whatever else stands in the path. The first that occurs counts.
STUDY_NAMES = [re.compile(pattern) for pattern in (
    r"(?<!\d)\d{3}_S_\d{4,5}(?!\d)",  # ADNI
    r"(?<![A-Za-z0-9])(?:AIBL|PPMI)_\d+(?!\d)",  # as LONI names files: STUDY_PERSON_MR_...
    r"OAS(?:[12]_\d{4}|[34]\d{4})(?!\d)",  # OASIS-1 to 4: OAS1_0001_MR1, OAS30001_MR_d0129
    r"IXI\d{3}(?!\d)",
    r"NDARINV[A-Za-z0-9]{8}",  # ABCD
    r"NACC\d{6}(?!\d)",
    r"(?<![A-Za-z0-9])CC\d{6}(?!\d)",  # Cam-CAN
    r"(?<!\d)\d{7}(?=_2\d{4}_\d+_\d+(?!\d))",  # UK Biobank: PERSON_FIELD_INSTANCE_ARRAY
    r"HC[AD]\d{7}(?!\d)",  # HCP, ageing and development: HCA6002236_V1_MR
    r"(?<![A-Za-z0-9])\d{6}(?=(?:_V\d)?(?:_MR|_3T|/T1w/|/MNINonLinear/|/unprocessed/))",  # HCP, young adults
    r"(?<![A-Za-z0-9])BraTS(?:\d{4}_\d{5}|\d\d_[A-Za-z0-9]+_[A-Za-z0-9]+|-[A-Za-z]+-\d{5})")]
ENDING = re.compile(r"\.(nii|nii\.gz|mgz|hdr|img)$", re.IGNORECASE)
BIDS_NAME = re.compile(r"(?<![A-Za-z0-9])sub-[A-Za-z0-9]+")

# The words of a path that say when and how a head was scanned, not whose it is
VISIT = (r"ses(?:sion)?[-_ ]?[a-z0-9]+|(?:month|week|day)[-_ ]?\d{1,3}"
         r"|(?:visit|year|wave|time-?point|time|tp|scan|run|exam|repeat|follow-?up|fu|mr|v|y|w)[-_ ]?\d{1,2}"
         r"|m\d{1,3}|t0|anat[-_]\d|(?:19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d"
         r"|baseline|bl|base|screening|initial|follow-?up|fu|pre|post|test|retest|mr")
T1_NAMES = r"t1|t1w|t1n|unit1|mp-?rage|mpr|spgr|fspgr"
OTHER_NAMES = (r"t2[a-z]*|t1(?:ce|c|gd|post|km|map|rho)|[a-z0-9]*flair|pdw?|dwi|dti|adc|bold|sbref|epi|fmri"
               r"|asl|cbf|swi|mra|tof|angio|pet|inv-?\d|phase(?:diff|\d)?|magnitude\d?|fieldmap|localizer"
               r"|scout")
# Groups of people. An equal name in two of them may be two people, or one who moved (a travelling subject).
GROUP = (r"(?:site|cent(?:er|re)|hospital)[-_ ]?[a-z0-9]+|controls?|healthy|hc|patients?|cases?"
         r"|(?:group|class|cohort|batch|dis[ck]|part|fold)[-_ ]?\d+|train(?:ing)?|val(?:idation)?|[elps]?mci"
         r"|ad|cn|nc|nl|smc|ftd|(?:very)?mild|moderate|(?:non)?-?demented|converted|dementia")
WORD = re.compile(rf"(?<![a-z0-9])(?:{VISIT}|{T1_NAMES}|{OTHER_NAMES}|(?P<group>{GROUP}))(?![a-z0-9])"
                  r"|(?P<name>[^\W_]+)", re.IGNORECASE)
MAX_SESSIONS = 12  # of a person; where there are more, what was taken for visits may be people
MIN_GROUP = 5  # people in a folder of unknown meaning; one with fewer may be a person's, with as many visits
# The words of a path but for visits, contrasts, and what stands in all paths. `name` probably is the person:
# a BIDS name, else the first word with a digit, else the first. What stands `above` and `below` it are lists.
# `outermost` is the first word that is no group: `name`, or a folder around it that may be a person's.
PathWords = namedtuple("PathWords", "outermost above name below")


def people_of(paths, pattern=None):
    """Tells whose head each file is: by the names of well-known studies, wherever they stand, or else by what
    is left of its path without visits and contrasts, if that names the person in one way only.

    Args:
        paths: texts, below the folder of the study.
        pattern: a regular expression whose one group is the person, in place of all rules.

    Returns:
        A list of texts; None where `pattern` finds nothing.

    Raises:
        UserError: if there is more than one reading, with the readings; or if `pattern` cannot be used.
    """
    if pattern is not None:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--person-pattern {pattern!r} is no regular expression ({error}); "
                            "give one like 'patient_([0-9]+)'.") from error
        if regex.groups != 1:
            raise UserError(f"--person-pattern {pattern!r} has {regex.groups} groups; put ( ) around the "
                            "person alone, like 'patient_([0-9]+)'.")
        return [match[1] if (match := regex.search(path)) else None for path in paths]
    people = [next((match[0] for regex in STUDY_NAMES if (match := regex.search(path))), None)
              for path in paths]
    others = [ENDING.sub("", path) for path, person in zip(paths, people) if person is None]
    understood = iter(_understand(others) if others else ())
    return [person or next(understood) for person in people]


def _understand(paths):
    """The person of each path, a list of texts; `UserError` if another reading gives other people."""
    rows = _read_words(paths)
    people = [row.name for row in rows]
    readings = [
        people,
        ["/".join([*row.above, row.name]) for row in rows],  # equal names in several folders: several people
        ["/".join([row.name, *row.below]) for row in rows],  # what follows the name belongs to it
        # P01a and P01b, or P001V1 and P001V2, are two visits.
        [re.sub(r"(?i)(?<=\d)[a-z]$|(?<=\d\d)[a-z]+\d{0,2}$", "", person) for person in people],
        _shared_words(rows),
    ]
    around = {(row.outermost, row.name) for row in rows if row.outermost != row.name}
    if min(Counter(word for word, _ in around).values(), default=MIN_GROUP) < MIN_GROUP:
        readings.append([row.outermost for row in rows])
    sessions = Counter(person for person in people if not BIDS_NAME.search(person))
    if max(sessions.values(), default=0) > MAX_SESSIONS:
        readings.append(paths)
    if any(not _same(people, reading) for reading in readings):
        raise _refusal(readings)
    return people


def _read_words(paths):
    """The `PathWords` of each path; `UserError` if one has no word left that may be a name."""
    spellings, found = {}, []
    for path in paths:
        bids = BIDS_NAME.search(path)
        matches = WORD.finditer(path, 0, bids.start() if bids else len(path))
        words = [(match.lastgroup, match[0]) for match in matches if match.lastgroup]
        words += [("bids", bids[0])] if bids else []
        # P01 and p01 are one word, and each counts once.
        found.append({spellings.setdefault(text.casefold(), text): kind for kind, text in words})
    common = set(found[0]).intersection(*found)
    if any(common.issuperset(words) for words in found):
        common = set()  # of one person alone all words are in all paths
    rows = []
    for words in found:
        texts = [text for text in words if text not in common]
        names = [text for text in texts if words[text] != "group"]
        if not names:
            raise _refusal([["all"] * len(paths), paths])
        if words[names[-1]] == "bids":
            names = names[-1:]
        name = next((text for text in names if re.search(r"\d", text)), names[0])
        start = texts.index(name)
        rows.append(PathWords(names[0], texts[:start], name, texts[start + 1:]))
    return rows


def _shared_words(rows):
    """A reading in which a word that follows several names is the person: P01 of I123_P01 and I124_P01."""
    num_owners = Counter(word for word, _ in {(word, row.name) for row in rows for word in row.below})
    # Neither a group, nor the number of a series, nor a place where many were
    shared = {word for word, count in num_owners.items()
              if count > 1 and (count < MIN_GROUP or re.search(r"\d", word))
              and WORD.fullmatch(word).lastgroup == "name" and not re.fullmatch(r"\d{1,2}", word)}
    return [next((word for word in row.below if word in shared), row.name) for row in rows]


def _same(reading, other):
    """Whether two readings, lists of people, make the same files one person."""
    return len(set(reading)) == len(set(other)) == len(set(zip(reading, other)))


def _refusal(readings):
    """The `UserError` that shows different readings, each a list of the people of all files."""
    different, descriptions = [], []
    for reading in readings:
        if any(_same(reading, other) for other in different):
            continue
        different.append(reading)
        sessions = Counter(reading)
        fewest, most = min(sessions.values()), max(sessions.values())
        number = f"{fewest} to {most}" if fewest < most else str(most)
        people = f"{len(sessions)} {'people' if len(sessions) > 1 else 'person'}"
        descriptions.append(f"{people} with {number} session{'s' * (most > 1)} each (such as {reading[0]})")
    return UserError(
        f"It cannot be told whose heads these {len(readings[0])} sessions are: {', or '.join(descriptions)}? "
        "Give --person-pattern, a regular expression for the paths whose one group is the person, such as "
        "'([^/]+)/[^/]*$' for the folder that each file is in.")
