"""Whose head a file of a study is, by its path: understood, or refused with the possible readings. Nothing is
guessed, for one person in two splits makes every result on held-out people wrong.
"""

from collections import Counter, defaultdict, namedtuple
import itertools
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
ENDING = re.compile(r"\.(nii|nii\.gz|mgz|hdr|img)$", re.IGNORECASE)

# The words of a path that say when and how a head was scanned, not whose it is
VISIT = (r"ses-(?:[a-z]+\d{0,2}|\d{1,8})|ses(?:sion)?[-_ ]?\d{1,2}|(?:month|week|day)[-_ ]?\d{1,3}"
         r"|(?:visit|year|wave|time-?point|time|tp|scan|run|exam|repeat|follow-?up|fu|mr|v|y|w)[-_ ]?\d{1,2}"
         r"|m\d{1,3}|t0|anat(?:[-_]\d)?|(?:19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d"
         r"|baseline|bl|base|screening|initial|follow-?up|fu|pre|post|test|retest|mr"
         r"|(?:acq|ce|desc|echo|rec|res|space|task)-[a-z0-9]+")
T1_NAMES = r"t1|t1w|t1n|unit1|mp-?rage|mpr\d?|spgr|fspgr"
OTHER_NAMES = (r"t2[a-z]*|t1(?:ce|c|gd|post|km|map|rho)|[a-z0-9]*flair|pdw?|dwi|dti|adc|bold|sbref|epi|fmri"
               r"|asl|cbf|swi|mra|tof|angio|pet|inv-?\d|phase(?:diff|\d)?|magnitude\d?|fieldmap|localizer"
               r"|scout")
# Groups of people. An equal name in two of them may be two people, or one who moved (a travelling subject).
GROUP = (r"(?:site|cent(?:er|re)|hospital)[-_ ]?[a-z0-9]+|controls?|healthy|hc|patients?|cases?"
         r"|(?:group|class|cohort|batch|dis[ck]|part|fold)[-_ ]?\d+|train(?:ing)?|val(?:idation)?|[elps]?mci"
         r"|ad|cn|nc|nl|smc|ftd|(?:very)?mild|moderate|(?:non)?-?demented|converted|dementia")
WORD = re.compile(rf"(?<![a-z0-9])(?:(?P<bids>sub-[a-z0-9]+(?=[_/]|$))|(?:(?P<visit>{VISIT})|{T1_NAMES}|"
                  rf"{OTHER_NAMES}|(?P<group>{GROUP}))(?![a-z0-9]))|(?P<name>[^\W_]+)", re.IGNORECASE)
DATE = r"(?:19|20)\d\d[01]\d[0-3]\d"
PART = re.compile(rf"{DATE}|\d+?(?={DATE}|\D|$)|[^\W\d_]+")  # of P01a20120502: P, 01, a, 20120502
MAX_SESSIONS = 12  # of a person; where there are more, what was taken for visits may be people
# The words of a path but for visits, contrasts, and what stands in all paths: `name`, which probably is the
# person and of `kind` study, bids, or name; lists of what stands `above` and `below` it; `parts`, the numbers
# and letters of all words but groups, each of which may be a person; and the first `visit` with a number.
PathWords = namedtuple("PathWords", "kind above name below parts visit")


def people_of(paths, pattern=None):
    """Tells whose head each file is: by the names of well-known studies, wherever they stand, or else by what
    is left of its path without visits and contrasts, if that names the person in one way only.

    Args:
        paths: texts, below the folder of the study.
        pattern: a regular expression whose one group is the person, in place of all rules.

    Returns:
        A list of texts; None where `pattern` finds nothing. A `UserError` if there is more than one reading,
        with the readings, or if `pattern` cannot be used.
    """
    if pattern is None:
        return _understand(paths) if paths else []
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--person-pattern {pattern!r} is no regular expression ({error}); "
                        "give one like 'patient_([0-9]+)'.") from error
    if regex.groups != 1:
        raise UserError(f"--person-pattern {pattern!r} has {regex.groups} groups; put ( ) around the "
                        "person alone, like 'patient_([0-9]+)'.")
    return [match[1] if (match := regex.search(path)) else None for path in paths]


def _understand(paths):
    """The person of each path, a list of texts; `UserError` if another reading gives other people."""
    rows = _read_words(paths)
    people = [row.name for row in rows]
    readings = [people,
                ["/".join([*row.above, row.name]) for row in rows],  # equal names in two folders: two people
                ["/".join([row.name, *row.below]) for row in rows],  # what follows the name belongs to it
                *_glued_digits(rows)]
    scans = {(row.name, *row.visit) for row in rows if row.kind == "name"}
    names, visits = {scan[0] for scan in scans}, {scan[1:] for scan in scans}
    # Visits that no one has two of, more than there are people, or alone with numbers may be people: m01.
    no_digit = not any(re.search(r"\d", name) for name in names)
    if len(names) < len(visits) or 1 < len(visits) and (no_digit or len(visits) < len(names) == len(scans)):
        readings.append([(row.visit or [row.name])[0] for row in rows])
    if max(Counter(row.name for row in rows if row.kind == "name").values(), default=0) > MAX_SESSIONS:
        readings.append(paths)
    shared = _shared_parts(rows)
    for order in (1, -1):
        readings.append([next(filter(shared.__contains__, row.parts[::order]), row.name) for row in rows])
    if shared or len(set(map(_partition, readings))) > 1:
        raise _refusal(paths, readings)
    return people


def _read_words(paths):
    """The `PathWords` of each path; `UserError` if one has no word left that may be a name."""
    spellings, visits, found, rows = {}, [], [], []
    for path in (ENDING.sub("", path) for path in paths):
        # 002_S_0413 and sub-ADNI002S0413 are one name.
        studies = {re.sub("_|ADNI", "", match[0]): match[0] for match in STUDY_NAME.finditer(path)}
        if len(studies) == 1:
            words = [("study", *studies.popitem())]
        else:  # P01, p01 and sub-P01 are one word, and each counts once.
            words = [(match.lastgroup, match[0].casefold().removeprefix("sub-"), match[0])
                     for match in WORD.finditer(path) if match.lastgroup]
        visits.append([key for kind, key, _ in words if kind == "visit" and re.search(r"\D\d{1,3}$", key)])
        found.append({spellings.setdefault(key, text): kind for kind, key, text in words if kind != "visit"})
    for words, texts, visit in zip(found, _without_common(map(list, found)), visits):
        names = [text for text in texts if words[text] != "group"]
        if not names:
            raise _refusal(paths, [["all"] * len(paths), paths])
        name = next((text for text in names if words[text] in ("study", "bids")),
                    next((text for text in names if re.search(r"\d", text)), names[0]))
        start, parts = texts.index(name), PART.findall(" ".join(names).replace("sub-", ""))
        rows.append(PathWords(words[name], texts[:start], name, texts[start + 1:], parts, visit[:1]))
    return [row._replace(parts=[part.lstrip("0") or part[:1] for part in parts])
            for row, parts in zip(rows, _without_common(row.parts for row in rows))]


def _without_common(lists):
    """The lists without what stands in all of them at one place, counted from the first or from the last."""
    lists = list(lists)
    front, back = ({place for place, column in enumerate(zip(*(items[::order] for items in lists)))
                    if len(set(column)) == 1} for order in (1, -1))
    shorter = [[item for place, item in enumerate(items)
                if place not in front and len(items) - 1 - place not in back] for items in lists]
    return shorter if all(shorter) else lists  # of one person alone, all is in all paths


def _shared_parts(rows):
    """The numbers and letters in the paths of two names, a set of texts: P01 and preP1, I2_P01 and I3_P01."""
    owners = defaultdict(set)
    for row in rows:
        for part in row.parts:
            owners[part].add((row.name, row.kind))
    return {part for part, names in owners.items() if len(names) > 1
            and {kind for _, kind in names} != {"study"}  # names of a study may share numbers
            # Letters of many people are a place or a class; those in all paths say nothing.
            and (part.isdigit() or len(names) <= MAX_SESSIONS and any(part not in row.parts for row in rows))}


def _glued_digits(rows):
    """Readings, lists of people, in which a long number is a person and a visit without a letter between."""
    numbers = [max(re.findall(r"\d+", " ".join([row.name, *row.above, *row.below])), key=len, default="0")
               for row in rows]
    names, readings = sorted(set(numbers), key=int), []
    if any(row.kind == "study" for row in rows) or int(names[-1]) - int(names[0]) < 1.5 * len(names):
        return []  # numbers without large gaps are of people
    for cut, visit_first in itertools.product(range(1, len(names[-1])), (False, True)):
        person, visit = (slice(cut, None), slice(cut)) if visit_first else (slice(-cut), slice(-cut, None))
        sessions, num_visits = Counter(name[person] for name in names), len({name[visit] for name in names})
        is_grid = num_visits <= min(MAX_SESSIONS if cut > 1 else 4, len(names) / 1.5)
        is_dated = cut >= 6 and len(names[-1]) - cut >= 3  # dates and numbers of images may all be different
        if ((is_grid or is_dated) and 3 <= len(sessions) <= len(names) / 1.2
                and max(sessions.values()) <= MAX_SESSIONS):
            readings.append([number[person] for number in numbers])
    return readings


def _partition(people):
    """Which files are of one person, whatever their name: a number for each file."""
    numbers = {}
    return tuple(numbers.setdefault(person, len(numbers)) for person in people)


def _pattern_for(paths, reading):
    """A --person-pattern that gives this reading, in words for the user; or nothing."""
    first_number, last_number = "[^/0-9]*0*([0-9]+)", "[^/]*?0*([0-9]+)[^/0-9]*(?:/|$)"
    names = "([^/]+)", "([^/_.-]+)", "[^/_.-]+[_.-]([^/_.-]+)", first_number, last_number
    for level, name in itertools.product(range(5), names):
        pattern = f"^{'[^/]+/' * level}{name}"
        people = people_of(paths, pattern)
        if None not in people and _partition(people) == _partition(reading):
            return f"; --person-pattern '{pattern}'"
    return ""


def _refusal(paths, readings):
    """The `UserError` that shows different readings, each a list of the people of all files."""
    descriptions = []
    for reading in {_partition(reading): reading for reading in readings[::-1]}.values():
        sessions = Counter(reading)
        number = "-".join(map(str, sorted({min(sessions.values()), max(sessions.values())})))
        people = f"{len(sessions)} {'people' if len(sessions) > 1 else 'person'}"
        descriptions.insert(0, f"{people} with {number} session{'s' * (number != '1')} each (such as "
                            f"{', '.join(list(sessions)[:2])}{_pattern_for(paths, reading)})")
    return UserError(
        f"It cannot be told whose heads these {len(paths)} sessions are: {', or '.join(descriptions)}? "
        "Give --person-pattern, a regular expression for the paths whose one group is the person.")
