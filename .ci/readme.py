#!/usr/bin/env python3
"README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `python .ci/readme.py --check` only compares."
import base64
import posixpath
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
notice = '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->\n\n'
picture_types = {'image/png': 'png', 'image/jpeg': 'jpg', 'image/svg+xml': 'svg'}


def relink(text):
    "Links that hold in nbs/ made to hold one folder above; code, web addresses and #anchors stay"
    def fix(m):
        before, link, after = m.groups()
        if re.match(r'[a-z][\w+.-]*:|#|/', link, re.I): return m[0]
        return before + posixpath.normpath(posixpath.join('nbs', link)) + after
    parts = re.split(r'(^```.*?^```|`[^`\n]+`)', text, flags=re.S | re.M)
    parts[::2] = [re.sub(r'''(<(?:img|a|source)\b[^>]*?\b(?:src|href)=")([^"]+)(")''', fix, re.sub(r'(\]\()([^)\s]+)([^)]*\))', fix, o)) for o in parts[::2]]
    return ''.join(parts)


def joined(o): return o if isinstance(o, str) else ''.join(o)


def fence(text, lang=''):
    ticks = '`'*max(3, 1 + max((len(o) for o in re.findall('`+', text)), default=0))
    return f'{ticks}{lang}\n{text}\n{ticks}'


def output(o, name, pictures):
    "One saved output as markdown; a picture's bytes go to `pictures`"
    if o['output_type'] == 'error': raise SystemExit(f'{name}: an error is saved in this cell; run the notebook again')
    if o['output_type'] == 'stream': return fence(joined(o['text']).rstrip()) if o['name'] == 'stdout' else ''
    data = o['data']
    for kind, ending in picture_types.items():
        if kind in data:
            raw = joined(data[kind])
            pictures[f'{name}.{ending}'] = raw.encode() if ending == 'svg' else base64.b64decode(raw)
            return f'![](README_files/{name}.{ending})'
    if 'text/markdown' in data: return relink(joined(data['text/markdown']).strip())
    return fence(joined(data['text/plain']).rstrip()) if 'text/plain' in data else ''


def blocks(cell, pictures):
    "The pieces of markdown that a cell becomes: source, then outputs"
    if cell.cell_type == 'markdown': return [relink(cell.source.strip())]
    flags = cell.directives
    if cell.cell_type != 'code' or {'hide', 'default_exp'} & set(flags): return []
    source = re.sub(r'^#\s*\|.*\n?', '', cell.source, flags=re.M).strip()
    shown = [] if 'hide_input' in flags or flags.get('echo') == 'false' else [fence(source, 'python')] if source else []
    if 'hide_output' in flags or flags.get('output') == 'false': return shown
    outs = [output(o, f'{cell.id}-{i}' if i else cell.id, pictures) for i, o in enumerate(cell.get('outputs', []))]
    return shown + outs


def readme(path):
    "Text of the README that the notebook at `path` becomes, and its pictures `{name: bytes}`"
    pictures = {}
    parts = [o for cell in read_nb(path).cells for o in blocks(cell, pictures) if o]
    return notice + '\n\n'.join(parts) + '\n', pictures


def written(folder):
    "What is in `folder` now, in the form of `readme`"
    text, files = folder/'README.md', folder/'README_files'
    return text.read_text(encoding='utf-8') if text.exists() else '', {o.name: o.read_bytes() for o in files.glob('*')}


def write(folder, text, pictures):
    (folder/'README.md').write_text(text, encoding='utf-8', newline='\n')
    files = folder/'README_files'
    for o in files.glob('*'):
        if o.name not in pictures: o.unlink()
    if pictures: files.mkdir(exist_ok=True)
    elif files.is_dir(): files.rmdir()
    for name, data in pictures.items(): (files/name).write_bytes(data)


def main(check=False, folder=root):
    text, pictures = readme(folder/'nbs'/'index.ipynb')
    if not check: write(folder, text, pictures)
    elif written(folder) != (text, pictures): raise SystemExit('README.md is not what nbs/index.ipynb says: run  python .ci/readme.py')


if __name__ == '__main__': main('--check' in sys.argv[1:])
