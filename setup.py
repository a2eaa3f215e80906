"Packaging reads `settings.ini`, the one place where metadata and requirements are edited"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {o: cfg[f'{o}_requirements'].split() for o in ('dev', 'docs', 'dist')}
minor = int(cfg['min_python'].split('.')[1])

setup(
    name = cfg['lib_name'],
    version = cfg['version'],
    description = cfg['description'],
    long_description = (here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type = 'text/markdown',
    keywords = cfg['keywords'].split(),
    author = cfg['author'],
    author_email = cfg['author_email'],
    license_expression = 'Apache-2.0',
    license_files = ['LICENSE'],
    classifiers = ['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                   'Natural Language :: English'] + [f'Programming Language :: Python :: 3.{m}' for m in range(minor, 14)],
    packages = find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data = {cfg['lib_path']: ['**/*.csv', '**/*.css', 'py.typed']},
    python_requires = f">={cfg['min_python']}",
    install_requires = cfg['requirements'].split(),
    extras_require = extras,
    entry_points = {'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe = False,
)
