"""Who is in which split, and which file is whose: path templates, the three lists and data_info.csv, new lists."""

import csv
import glob
import os
import random
import re
import shutil

from volume import DataError

SPLITS = ('train', 'validation', 'test')


class MissingFile(DataError):
    """No file is where a template says; the one fault that some callers expect."""


# ----------------------------------------------------------------------------------------------------------------------
# Path templates: {root} and {id} are filled in, * stands for any part of a file or folder name

def _other_suffix(path):
    """x.nii <-> x.nii.gz; None for other names."""
    if path.endswith('.nii.gz'):
        return path[:-3]
    return path + '.gz' if path.endswith('.nii') else None


def _root(root):
    return os.path.normpath(os.path.expanduser(str(root))).replace(os.sep, '/')


def _fill(template, root, id):
    """The glob pattern of a template; only its own * are wild, whatever characters root and id hold."""
    if '{id}' not in template:
        raise DataError(f"template '{template}' lacks {{id}}, which stands for the subject; correct it in config.py.")
    words = {'root': _root(root), 'id': str(id)}
    try:
        return '*'.join(glob.escape(part.format(**words)) for part in template.split('*'))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"template '{template}' may hold only {{root}}, {{id}} and * in config.py.") from error


def find_file(template, root, id):
    """The one file that a template names; .nii also finds .nii.gz and vice versa. DataError for none or several."""
    pattern = _fill(template, root, id)
    for candidate in (pattern, _other_suffix(pattern)):
        found = sorted(glob.glob(candidate)) if candidate else []
        if len(found) > 1:
            raise DataError(f"{len(found)} files match '{_plain(candidate)}' ({', '.join(found)}); keep one or "
                            f'make the template in config.py more precise.')
        if found:
            return found[0]
    either = ' (as .nii and .nii.gz)' if _other_suffix(pattern) else ''
    raise MissingFile(f'{_plain(pattern)} is missing{either}; add it, '
                      f'correct the template or data_root in config.py, or take the subject off its list.')


def _plain(pattern):
    """A glob pattern as the user would write it."""
    return re.sub(r'\[([*?[])\]', r'\1', pattern)


def find_ids(template, root):
    """All IDs for which a template finds a file."""
    pattern = _fill(template, root, '\0').replace('\0', '*')
    parts = re.split(r'(\{id\}|\{root\}|\*)', re.sub(r'\.nii(\.gz)?$', '', template))
    seen, expression = False, ''
    for part in parts:
        if part == '{id}':
            expression += '(?P=id)' if seen else '(?P<id>[^/]+?)'
            seen = True
        else:
            expression += {'*': '[^/]*', '{root}': re.escape(_root(root))}.get(part, re.escape(part))
    expression += r'(\.nii(\.gz)?)?' if re.search(r'\.nii(\.gz)?$', template) else ''
    files = [file for p in (pattern, _other_suffix(pattern)) if p for file in glob.glob(p)]
    found = (re.fullmatch(expression, file.replace(os.sep, '/')) for file in files)
    return sorted({match['id'] for match in found if match})


# ----------------------------------------------------------------------------------------------------------------------
# Lists and labels

def _read_ids(path):
    """IDs of one list: one a line, empty lines and lines starting with # left out; None if there is no such file."""
    if not os.path.isfile(path):
        return None
    return [line.strip() for line in _text(path).splitlines() if line.strip() and not line.startswith('#')]


def _text(path):
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not plain text in UTF-8 (byte {error.start}); save it again as such.') from error


def read_table(data_info):
    """Rows of data_info.csv as dict ID -> dict of strings; {} if there is no such file."""
    path = os.path.join(data_info, 'data_info.csv')
    if not os.path.isfile(path):
        return {}
    text = _text(path)
    delimiter = max(',;\t', key=text.split('\n', 1)[0].count)  # spreadsheets of some countries write ;
    rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
    known = {name.lower(): name for name in ('ID', 'label', 'patient')}
    rows = [{known.get(k.strip().lower(), k.strip()): (v or '').strip() for k, v in row.items() if k is not None}
            for row in rows]
    if rows and 'ID' not in rows[0]:
        raise DataError(f'{path} has no column ID, only {", ".join(rows[0])}; its first line must be ID,label or '
                        f'ID,label,patient.')
    table = {}
    for row in rows:
        if row['ID'] and table.setdefault(row['ID'], row) != row:
            raise DataError(f"{path} has two different rows for {row['ID']}; keep one.")
    unnamed = [id for id, row in table.items() if not row.get('patient')]
    if 0 < len(unnamed) < len(table):
        raise DataError(f'{path} names no patient for {unnamed[0]} ({len(unnamed)} rows in all); fill the column for '
                        'each ID, or leave it out.')
    return table


def read_lists(data_info):
    """
    (lists, faults): lists is dict split -> IDs; faults are (ID or file name, sentence) for an ID or a patient in two
    lists, an ID twice in one, an ID without patient where others have one, an empty or missing list.
    """
    lists, faults, where, visits = {}, [], {}, {}
    try:
        table = read_table(data_info)
    except DataError as error:
        table, faults = {}, [('data_info.csv', str(error))]
    named = any(row.get('patient') for row in table.values())
    for split in SPLITS:
        path = os.path.join(data_info, f'{split}.txt')
        ids = _read_ids(path)
        lists[split] = list(dict.fromkeys(ids or []))
        if not ids:
            what = 'is missing' if ids is None else 'names no subject'
            faults.append((f'{split}.txt', f'{path} {what}; write one ID a line, or run python dataset.py '
                                           f'--make_splits 0.6,0.2,0.2.'))
        for id in sorted({id for id in lists[split] if ids.count(id) > 1}):
            faults.append((id, f'{path} names it {ids.count(id)} times; keep one line.'))
        for id in lists[split]:
            if id in where:
                twice = os.path.join(data_info, f'{where[id]}.txt')
                faults.append((id, f'{path} and {twice} both name it; remove it from one.'))
                continue
            where[id] = split
            if named and id not in table:
                faults.append((id, f"{os.path.join(data_info, 'data_info.csv')} names patients, but has no row for it; "
                                   f'add one.'))
            patient = table.get(id, {}).get('patient') or id
            other = visits.setdefault(patient.casefold(), (id, split))
            if other[1] != split:
                there = os.path.join(data_info, f'{other[1]}.txt')
                faults.append((id, f'{path} names it, and {there} names {other[0]}, of the same patient {patient}; put '
                                   f'all visits of a patient in one list.'))
    return lists, faults


def read_split(data_info, split):
    """IDs of 'train', 'validation' or 'test'. DataError if that list is empty or an ID or a patient is in two lists."""
    lists, faults = read_lists(data_info)
    for name, sentence in faults:
        if name not in {f'{other}.txt' for other in SPLITS if other != split}:  # another list may be absent
            raise DataError(f'{name}: {sentence}')
    return lists[split]


def label_of(row, num_classes, data_info):
    """The label in one row of data_info.csv, num_classes where it says unknown.

    DataError if it is missing or neither that nor one of 0..num_classes - 1.
    """
    path = os.path.join(data_info, 'data_info.csv')
    text = (row or {}).get('label', '')
    if text.lower() == 'unknown':
        return num_classes
    if not text:
        what = 'has no label for it' if os.path.isfile(path) else 'is missing, and with it the label'
        raise DataError(f'{path} {what}; add one of 0..{num_classes - 1}, or unknown, or set num_classes = 0.')
    try:
        value = float(text)
    except ValueError:
        value = -1
    if value not in range(num_classes):
        raise DataError(f"{path} has the label '{text}', but num_classes = {num_classes} allows 0..{num_classes - 1} "
                        'and unknown; correct one.')
    return int(value)


def read_labels(data_info, ids, num_classes):
    """dict ID -> label, num_classes where unknown. DataError if one is missing or out of range, or none is known."""
    table, labels = read_table(data_info), {}
    for id in ids:
        try:
            labels[id] = label_of(table.get(id), num_classes, data_info)
        except DataError as error:
            raise DataError(f'{id}: {error}') from error
    if labels and min(labels.values()) == num_classes:
        raise DataError(f"{os.path.join(data_info, 'data_info.csv')} knows the label of none of {len(labels)} "
                        'subjects; add those that are known, or set num_classes = 0.')
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# New lists

def make_splits(ids, data_info, shares, seed=0):
    """
    Write train.txt, validation.txt and test.txt: shares as '0.6,0.2,0.2', at random but the same for the same IDs and
    seed, all visits of a patient (data_info.csv) in one list, every list filled. Returns dict split -> IDs.

    Existing lists are an error, so that no split is lost, and so is an ID without a row in a table of patients.
    """
    try:
        parts = [float(word) for word in str(shares).replace('(', '').replace(')', '').split(',')]
    except ValueError:
        parts = []
    if len(parts) != 3 or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-6:
        raise DataError(f'--make_splits {shares} must be three positive shares that sum to 1, as in 0.6,0.2,0.2, or a '
                        'number of folds, as in 5-fold.')
    visits = _visits(ids, data_info, seed, 3)
    patients = list(visits)
    validation = max(1, min(round(parts[1] * len(patients)), len(patients) - 2))
    test = max(1, min(round(parts[2] * len(patients)), len(patients) - validation - 1))
    chosen = {'validation': patients[:validation], 'test': patients[validation:validation + test],
              'train': patients[validation + test:]}
    return _write_lists(data_info, {split: [id for patient in chosen[split] for id in visits[patient]]
                                    for split in SPLITS})


def make_folds(ids, data_info, count, seed=0):
    """
    Lists for a cross-validation: the folders <data_info>_1 .. _<count> with the three lists each, and data_info.csv.

    Each patient is in one test list; fold k is tested on part k, validated on the next part, trained on the others.
    Returns dict folder -> dict split -> IDs. DataError as make_splits.
    """
    if count < 3:
        raise DataError(f'--make_splits {count}-fold: a cross-validation here needs 3 folds or more.')
    visits, found, table = _visits(ids, data_info, seed, count), {}, os.path.join(data_info, 'data_info.csv')
    parts = [[id for patient in list(visits)[k::count] for id in visits[patient]] for k in range(count)]
    folders = [f'{os.path.normpath(data_info)}_{k + 1}' for k in range(count)]
    for folder in folders:
        _refuse_lists(folder)
    for k, folder in enumerate(folders):
        others = [part for n, part in enumerate(parts) if n not in (k, (k + 1) % count)]
        lists = {'train': sum(others, []), 'validation': parts[(k + 1) % count], 'test': parts[k]}
        found[folder] = _write_lists(folder, lists)
        if os.path.isfile(table):
            shutil.copy(table, folder)
    return found


def _visits(ids, data_info, seed, least):
    """dict patient -> IDs, patients in random order; DataError for an ID without patient or too few patients."""
    table, visits = read_table(data_info), {}
    without = sorted(id for id in ids if id not in table)
    if without and any(row.get('patient') for row in table.values()):
        raise DataError(f"{os.path.join(data_info, 'data_info.csv')} names patients, but has no row for {without[0]} "
                        f'({len(without)} subjects in all); add them.')
    for id in sorted(ids):
        visits.setdefault((table.get(id, {}).get('patient') or id).casefold(), []).append(id)
    if len(visits) < least:
        raise DataError(f'{"three lists" if least == 3 else f"{least} folds"} need at least {least} patients, but the '
                        f'templates found {len(visits)} ({len(ids)} subjects); correct data_root or the templates in '
                        'config.py.')
    patients = sorted(visits)
    random.Random(seed).shuffle(patients)
    return {patient: visits[patient] for patient in patients}


def _refuse_lists(data_info):
    """DataError where there is a list already."""
    existing = [path for path in (os.path.join(data_info, f'{split}.txt') for split in SPLITS) if _read_ids(path)]
    if existing:
        raise DataError(f'{", ".join(existing)} exists already; move it away first, so that no split is lost.')


def _write_lists(data_info, lists):
    """Write the three lists, sorted, and return them."""
    _refuse_lists(data_info)
    lists = {split: sorted(lists[split]) for split in SPLITS}
    os.makedirs(data_info, exist_ok=True)
    for split, names in lists.items():
        path = os.path.join(data_info, f'{split}.txt')
        with open(f'{path}.tmp', 'w', encoding='utf-8') as file:
            file.write(''.join(f'{id}\n' for id in names))
        os.replace(f'{path}.tmp', path)
    return lists
