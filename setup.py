"Author, licence, keywords, requirements and commands come from settings.ini; everything else from pyproject.toml."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=['='], interpolation=None)
config.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

def lines(key): return [o.strip() for o in cfg.get(key, '').splitlines() if o.strip()]

extras = {k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')}
extras['dev'] += [o for k, v in extras.items() if k not in ('dev', 'yolo') for o in v]

class with_data(build_py):
    "The folder data travels inside the package, where facelab.datasets.shipped finds it"
    def run(self):
        super().run()
        if not self.editable_mode: shutil.copytree(Path(__file__).parent/'data', Path(self.build_lib)/'facelab'/'data', dirs_exist_ok=True)

setup(author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
      classifiers=lines('classifiers'),
      cmdclass=dict(build_py=with_data),
      install_requires=lines('requirements'),
      extras_require=extras,
      entry_points={'console_scripts': lines('console_scripts'), 'nbdev': ['facelab = facelab._modidx:d']})
